"""Checks what the destination already holds: nothing, this job's own result, or another job's.

`inspect` only reads; `probe` writes one tiny object and removes it. Neither changes what is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune_api.messages.manifest import Manifest
from finetune_api.messages.run import JobRef
from finetune_api.names import CHECKPOINT_MANIFEST, CHECKPOINTS_DIR, FINETUNE_DIR, MANIFEST_PATH, checkpoint_dir
from finetune_trainer.errors import RunError
from finetune_trainer.paths import split_checkpoint_path

if TYPE_CHECKING:
    from finetune_trainer.storage.base import Storage


@dataclass(frozen=True)
class Destination:
    """Describes what the destination holds.

    `finished` is the manifest of this job's result, parsed and as bytes, if there is one.
    `checkpoints` are the steps that have a manifest, the newest first.
    """

    finished: tuple[Manifest, bytes] | None
    checkpoints: tuple[int, ...]


def inspect(storage: Storage, job: JobRef) -> Destination:
    """Returns what is there.

    Raises RunError(OutputOccupied) if it is the result of another job, or if the newest checkpoint
    whose manifest can be read is another job's.
    """
    data = storage.read(MANIFEST_PATH)
    if data is not None:
        return Destination((require_own_manifest(data, job, storage, MANIFEST_PATH), data), ())
    files = (split_checkpoint_path(entry.path) for entry in storage.list(CHECKPOINTS_DIR))
    steps = sorted((file[0] for file in files if file is not None and file[1] == CHECKPOINT_MANIFEST), reverse=True)
    for step in steps:
        data = storage.read(f"{checkpoint_dir(step)}/{CHECKPOINT_MANIFEST}")
        if data is not None and own_manifest(data, job, storage) is not None:
            break
    return Destination(None, tuple(steps))


def require_own_manifest(data: bytes, job: JobRef, storage: Storage, path: str) -> Manifest:
    """Returns the manifest in `data`, read from `path`.

    Raises RunError(OutputOccupied) if it isn't a manifest, or belongs to another job.
    """
    manifest = own_manifest(data, job, storage)
    if manifest is None:
        raise RunError(
            "OutputOccupied",
            f"output.uri: {storage.display}/{path} isn't a manifest of this trainer; choose another output.uri, or "
            "delete it",
        )
    return manifest


def own_manifest(data: bytes, job: JobRef, storage: Storage) -> Manifest | None:
    """Returns the manifest in `data`, or None if it isn't one.

    Raises RunError(OutputOccupied) if it belongs to another job.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError:
        return None
    owner = manifest.job
    if owner.uid != job.uid:
        content = "checkpoint" if manifest.kind == "checkpoint" else "result"
        raise RunError(
            "OutputOccupied",
            f"output.uri: {storage.display} has the {content} of {owner.namespace}/{owner.name}, "
            "not this job's; choose another output.uri, or delete its content",
        )
    return manifest


def probe(storage: Storage, job: JobRef) -> None:
    """Checks that the destination can be written, by a tiny object that is deleted again.

    It is created as a manifest is, so a storage that can't do that is noticed before training.
    Raises RunError, for example OutputNotFound or AccessDenied.
    """
    path = f"{FINETUNE_DIR}/.probe-{job.uid}-{job.attempt}"
    if not storage.create(path, b""):  # a probe that was killed has left it
        storage.write(path, b"")
    storage.delete((path,))
