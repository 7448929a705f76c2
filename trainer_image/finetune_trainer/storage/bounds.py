"""Bounds what a storage may answer, and to which servers a redirect of a public one may lead."""

from __future__ import annotations

import re
import socket
from functools import lru_cache

from finetune_api import addresses, untrusted
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FIELD, Role

MAX_FILES = 100_000
MAX_READ_BYTES = 64 << 20  # of what is read into memory, such as a manifest or an index
_INVALID_KEY = re.compile(r"path contained|illegal (character|sequence)|empty path segment", re.IGNORECASE)
INVALID: dict[Role, str] = {
    "model": "ModelInvalid",
    "checkpoint": "CheckpointInvalid",
    "dataset": "DatasetInvalid",
    "output": "InvalidConfig",
}


def check_count(files: int, role: Role, display: str) -> None:
    """Raises RunError for a folder with too many files."""
    if files > MAX_FILES:
        raise RunError(
            INVALID[role], f"{FIELD[role]}: {display} has more than {MAX_FILES:,} files; name a smaller folder"
        )


def check_read(size: int, role: Role, display: str) -> None:
    """Raises RunError for a file that is too large to be read into memory."""
    if size > MAX_READ_BYTES:
        raise RunError(
            INVALID[role], f"{FIELD[role]}: {display} has more than {MAX_READ_BYTES >> 20} MiB, which is too much for "
            "a file of its kind; replace it"
        )  # fmt: skip


def is_invalid_key(error: Exception) -> bool:
    """Whether a storage client refuses a key that it got in a listing."""
    return _INVALID_KEY.search(str(error)) is not None


def invalid_key(role: Role, display: str, cause: str) -> RunError:
    """Returns the error for a folder that has a key which is no path."""
    return RunError(
        INVALID[role],
        f"{FIELD[role]}: {display} has a key with an empty, . or .. part, which can't be a file's path; delete it, or "
        f"name another folder ({untrusted.line(cause, 300)})",
    )


def is_of_node(host: str) -> bool:
    """Whether a host is on this machine's link, or a service of the platform such as a cloud's
    metadata."""
    return any(map(addresses.is_of_node, _addresses(host)))


def is_of_machine(host: str) -> bool:
    """Whether a host is this machine itself."""
    return any(map(addresses.is_of_machine, _addresses(host)))


def is_internal(host: str) -> bool:
    """Whether a host is on this machine, on its link or in a private network.

    A name that can't be resolved here isn't: then a proxy resolves it.
    """
    return not all(map(addresses.is_public, _addresses(host)))


@lru_cache(maxsize=256)
def _addresses(host: str) -> tuple[str, ...]:
    try:
        resolved = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return ()
    return tuple(map(str, resolved))
