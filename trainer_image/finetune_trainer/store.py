"""The one room for remote files: a Location becomes a Place, whatever its scheme. Nothing else knows a scheme.

Used by fetch, destination, preflight and upload. Credentials are read here, from mounted files, and go nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_api.names import PVC_ROOT, SECRET_HF_TOKEN
from finetune_api.run import Location, S3Config
from finetune_trainer.failure import Failed
from finetune_trainer.folder import FolderPlace
from finetune_trainer.place import FIELD, NOT_FOUND, Entry, Place, Role


@dataclass(frozen=True)
class Access:
    """What is needed to open any place: the administrator's endpoint, the process's environment, and how long one
    request is tried again."""

    s3: S3Config
    environment: Mapping[str, str]
    retries: int = 6
    retry_seconds: float = 60.0


def open_folder(location: Location, role: Role, access: Access) -> Place:
    """The folder that a location names."""
    scheme, _, rest = location.uri.partition("://")
    if scheme == "file":
        return _folder(Path(rest), location, role)
    if scheme == "s3":
        return _bucket(rest, location, role, access)
    if scheme == "hf":
        return _hub(rest, location, role, access)
    raise Failed("InvalidConfig", f"{FIELD[role]}: {location.display}: {scheme}:// is no place that can be opened")


def open_file(location: Location, role: Role, access: Access) -> tuple[Place, Entry]:
    """The file that a location names, and the folder around it. Raises Failed when it isn't there."""
    uri, _, name = location.uri.rstrip("/").rpartition("/")
    if location.uri.startswith("hf://"):
        owner, dataset, path = [*location.uri.removeprefix("hf://").split("/", 2), "", ""][:3]
        uri, name = f"hf://{owner}/{dataset}", path
    place = open_folder(location.model_copy(update={"uri": uri}), role, access)
    entry = place.head(name)
    if entry is None:
        place.list()  # tells a missing bucket from a missing file
        raise Failed(
            NOT_FOUND[role],
            f"{FIELD[role]}: {location.display} isn't there, or is no file (a folder has / at its end)",
        )
    return place, entry


def open_files(location: Location, role: Role, access: Access) -> tuple[Place, tuple[Entry, ...]]:
    """The files that a folder (a URI with / at its end) or a pattern (with *) names, sorted; ** reaches into folders.

    A place's other files come too: who asks decides by their names. Raises Failed where there is none.
    """
    uri = location.uri
    at = uri.index("*") if "*" in uri else len(uri)
    root = uri[: uri.rindex("/", 0, at)]
    pattern = uri[len(root) + 1 :]
    if uri.startswith("hf://"):
        owner, dataset, below = [*root.removeprefix("hf://").split("/", 2), ""][:3]
        root, pattern = f"hf://{owner}/{dataset}", f"{below}/{pattern}" if below else pattern
    place = open_folder(location.model_copy(update={"uri": root}), role, access)
    matches = re.compile(_as_regex(pattern)).fullmatch
    found = tuple(entry for entry in place.list() if matches(entry.path))
    if not found:
        raise Failed(NOT_FOUND[role], f"{FIELD[role]}: {location.display}: no file is there that this names")
    return place, found


def _as_regex(pattern: str) -> str:
    """`*` stays within a folder, `**` doesn't, and an empty pattern or one that ends with / is all below it."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    said = "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*)", pattern))
    return said + ".*" if not pattern or pattern.endswith("/") else said


def resolved_revision(place: Place) -> str | None:
    """The commit of an hf:// place."""
    return getattr(place, "commit", None)


def _folder(root: Path, location: Location, role: Role) -> FolderPlace:
    claims = Path(PVC_ROOT)
    bounds = None
    if root.is_relative_to(claims) and root != claims:
        bounds = claims / root.relative_to(claims).parts[0]
    return FolderPlace(root, role=role, display=location.display, bounds=bounds)


def _bucket(rest: str, location: Location, role: Role, access: Access) -> Place:
    from finetune_trainer.bucket import Patience, access_options, open_bucket

    bucket, _, prefix = rest.partition("/")
    secret = _secret(location)
    try:
        options = access_options(access.s3, secret, access.environment)
    except Failed as failed:
        raise Failed(failed.reason, f"{_ref(role)}: {failed.message}") from None
    patience = Patience(retries=access.retries, seconds=access.retry_seconds)
    return open_bucket(bucket, prefix, role=role, display=location.display, options=options, patience=patience)


def _hub(rest: str, location: Location, role: Role, access: Access) -> Place:
    from finetune_trainer.hub import HubPlace

    secret = _secret(location)
    token = (secret or {}).get(SECRET_HF_TOKEN) or access.environment.get(SECRET_HF_TOKEN)
    if secret is not None and not token:
        raise Failed("CredentialsMissing", f"{_ref(role)}: the Secret has no key {SECRET_HF_TOKEN}")
    return HubPlace(
        rest.strip("/"),
        kind="model" if role == "model" else "dataset",
        role=role,
        display=location.display,
        revision=location.revision,
        token=token,
    )


def _secret(location: Location) -> dict[str, str] | None:
    """The Secret's keys, from the files that the kubelet mounts (`..data` links are skipped)."""
    if location.credentials is None:
        return None
    folder = Path(location.credentials)
    if not folder.is_dir():
        return {}
    return {
        file.name: file.read_text().strip()
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith("..")
    }


def _ref(role: Role) -> str:
    return FIELD[role].replace(".uri", ".credentialsRef")
