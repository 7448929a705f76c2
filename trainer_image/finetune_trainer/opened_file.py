"""Opens a file of a volume that somebody else may change at the same time.

A link may replace a file or a folder between the moment at which a path is checked and that at
which it is opened. So the path of what was opened is checked, and everything is read from there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20


class Moved(OSError):
    """Reports that a path led to another file than it should."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file at a path that has no link. Raises Moved if that isn't what it opened,
    and OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Moved(f"{path} is a link") from None
        raise
    with os.fdopen(descriptor, "rb") as file:
        if _path_of(descriptor, path) != str(path) or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Moved(f"{path} is a link, or was replaced while it was opened")
        yield file


@contextmanager
def opened_download(path: Path) -> Iterator[BinaryIO]:
    """Opens a file on the scratch disk, or the file on a volume to which a link there leads. Raises
    Moved if a link has replaced that one, and OSError."""
    if not path.is_symlink():
        with path.open("rb") as file:
            yield file
        return
    with opened(Path(os.readlink(path))) as file:
        yield file


def _path_of(descriptor: int, path: Path) -> str:
    """Returns the path of an open file. Only Linux has it; elsewhere, there are no volumes."""
    return os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else str(path)


def copy(source: BinaryIO, target: Path) -> str:
    """Copies a file, and returns the sha256 of what was copied."""
    with target.open("wb") as copied:
        return _read(source, copied.write)


def digest_of(source: BinaryIO) -> str:
    """Returns the sha256 of a file."""
    return _read(source, len)


def _read(source: BinaryIO, use: Callable[[bytes], object]) -> str:
    digest = hashlib.sha256()
    while data := source.read(_CHUNK_BYTES):
        digest.update(data)
        use(data)
    return digest.hexdigest()
