"""Decides whether a result in the destination is this job's and whole, by its signature and by
reading every file. It writes nothing but the file that it is reading, on the scratch disk."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from finetune_api.messages.manifest import Manifest
from finetune_trainer.destination.signing import Trust
from finetune_trainer.log import Log
from finetune_trainer.storage.base import Storage

_READING = "verified-file"


def whole_result(
    storage: Storage, result: tuple[Manifest, bytes] | None, trust: Trust, scratch: Path, log: Log
) -> tuple[Manifest, bytes] | None:
    """Returns a result of an earlier attempt if it counts; None if the job has to train.

    `result` is its manifest, parsed and as bytes.
    """
    if result is None:
        return None
    if not trust.believes(result[0]):
        log.warning("the output has a result that no pod of this job has signed; it isn't used")
        return None
    damage = first_damage(storage, result[0], scratch / _READING)
    if damage is not None:
        log.warning("the output has a damaged result of this job; it isn't used", detail=damage)
        return None
    return result


def first_damage(storage: Storage, manifest: Manifest, target: Path) -> str | None:
    """Returns what is wrong with the first file that differs from its entry in the manifest; None
    if there is none. Each file is downloaded to `target`, which is deleted."""
    entries = {entry.path: entry for entry in storage.list()}
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            return f"{file.path} leads out of the folder"
        if file.path not in entries:
            return f"{file.path} is missing"
        if entries[file.path].size != file.size:
            return f"{file.path} has {entries[file.path].size} bytes instead of {file.size}"
        try:
            if storage.download(entries[file.path], target) != file.sha256:
                return f"{file.path} has another sha256"
        finally:
            target.unlink(missing_ok=True)
    return None
