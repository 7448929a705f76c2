"""Writes and verifies the manifest of a local folder: every file's size and sha256.

Used by `checkpoint` (before it renames a folder into place) and by the supervisor (before it hands one to the ranks).
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune_api.manifest import FileEntry, Manifest, ManifestJob
from finetune_api.run import JobRef
from finetune_trainer import digests

NAME = "manifest.json"
INDEX = "index.json"  # there where a checkpoint is written in shards


def write_manifest(
    folder: Path,
    *,
    kind: Literal["adapter", "model", "checkpoint"],
    job: JobRef,
    step: int,
    provenance: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    known: tuple[FileEntry, ...] = (),
) -> Manifest:
    """Lists all files that lie in the folder now, and writes the list beside them, synced to disk.

    Those in `known` aren't read again.
    """
    entries = {entry.path: entry for entry in known}
    files = tuple(
        entries.get(path)
        or FileEntry(path=path, size=(folder / path).stat().st_size, sha256=digests.of_file(folder / path))
        for path in digests.relative_files(folder)
        if path != NAME
    )
    manifest = Manifest(
        kind=kind,
        job=ManifestJob(namespace=job.namespace, name=job.name, uid=job.uid, attempt=job.attempt),
        step=step,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        files=files,
        provenance=provenance or {},
        metrics=metrics or {},
    )
    with (folder / NAME).open("wb") as file:
        file.write(manifest.model_dump_json(by_alias=True, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where there is none that can be read."""
    try:
        return Manifest.model_validate_json((folder / NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def verify(folder: Path) -> str | None:
    """Why the folder isn't complete, or None when every listed file is there, whole and unchanged.

    Files that the manifest doesn't list are no concern of it.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{NAME} is missing or torn"
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            return f"{entry.path} is missing"
        if path.stat().st_size != entry.size:
            return f"{entry.path} has {path.stat().st_size} bytes instead of {entry.size}"
        if digests.of_file(path) != entry.sha256:
            return f"{entry.path} was altered"
    return None


def newest_complete(checkpoints: Path) -> Path | None:
    """The step-N folder with the highest N that verifies."""
    steps = (path for path in checkpoints.glob("step-*") if path.name[5:].isdigit())
    return next((path for path in sorted(steps, key=lambda p: -int(p.name[5:])) if verify(path) is None), None)
