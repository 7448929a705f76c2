"""Builds, writes and verifies the manifest of a local folder: the size and sha256 of every file.

A folder without a manifest that verifies is incomplete and is never loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune_api.messages.manifest import FileEntry, Manifest, ManifestJob
from finetune_api.messages.run import JobRef
from finetune_api.names import CHECKPOINT_MANIFEST, MANIFEST_PATH

INDEX = "index.json"  # exists if a checkpoint is sharded


@dataclass(frozen=True)
class Contents:
    """Describes what a folder holds: everything in its manifest except the files and the time."""

    kind: Literal["adapter", "model", "checkpoint"]
    job: JobRef
    step: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def build_manifest(
    folder: Path, contents: Contents, *, known: tuple[FileEntry, ...] = (), digests: bool = True
) -> Manifest:
    """Returns the manifest of all files that are in the folder now, except the manifest itself.

    The files in `known` aren't read again. Without `digests` every other sha256 is empty.
    """
    job = contents.job
    own_path = CHECKPOINT_MANIFEST if contents.kind == "checkpoint" else MANIFEST_PATH
    entries = {entry.path: entry for entry in known}
    return Manifest(
        kind=contents.kind,
        job=ManifestJob(namespace=job.namespace, name=job.name, uid=job.uid, attempt=job.attempt),
        step=contents.step,
        created=now_rfc3339(),
        files=tuple(
            entries.get(path) or _file_entry(folder, path, digests)
            for path in relative_files(folder)
            if path != own_path
        ),
        provenance=dict(contents.provenance),
        metrics=dict(contents.metrics),
    )


def write_checkpoint_manifest(folder: Path, job: JobRef, step: int, known: tuple[FileEntry, ...] = ()) -> None:
    """Writes the manifest of a checkpoint's files into its folder and syncs it to disk.

    The files in `known` aren't read again.
    """
    manifest = build_manifest(folder, Contents("checkpoint", job, step), known=known)
    with (folder / CHECKPOINT_MANIFEST).open("wb") as file:
        file.write(manifest.model_dump_json(by_alias=True, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path) -> str | None:
    """Returns None if every listed file exists with its size and digest, otherwise what is wrong.

    Files that the manifest doesn't list are ignored.
    """
    manifest = _read_checkpoint_manifest(folder)
    if manifest is None:
        return f"{CHECKPOINT_MANIFEST} is missing or can't be read"
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            return f"{entry.path} is missing"
        if path.stat().st_size != entry.size:
            return f"{entry.path} has {path.stat().st_size} bytes instead of {entry.size}"
        if of_file(path) != entry.sha256:
            return f"{entry.path} was altered"
    return None


def of_bytes(data: bytes) -> str:
    """Returns the sha256 of some bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """Returns the sha256 of a file as 64 hex digits. The file is read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(digests: Iterable[tuple[str, str]]) -> str:
    """Returns the digest `sha256:…` of a folder, given its (relative path, file digest) pairs.

    It is the sha256 of the sorted lines that `sha256sum` would print.
    """
    folder_digest = hashlib.sha256()
    for path, digest in sorted(digests):
        folder_digest.update(f"{digest}  {path}\n".encode())
    return f"sha256:{folder_digest.hexdigest()}"


def relative_files(folder: Path) -> tuple[str, ...]:
    """Returns all files below a folder as sorted POSIX paths relative to it."""
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))


def now_rfc3339() -> str:
    """Returns the time now, in UTC by RFC 3339, in seconds; for example 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _file_entry(folder: Path, path: str, digests: bool) -> FileEntry:
    file = folder / path
    return FileEntry(path=path, size=file.stat().st_size, sha256=of_file(file) if digests else "")


def _read_checkpoint_manifest(folder: Path) -> Manifest | None:
    """Returns the folder's manifest, or None if it is missing or can't be read."""
    try:
        return Manifest.model_validate_json((folder / CHECKPOINT_MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None
