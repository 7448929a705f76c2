"""Takes over what a deleted job of the same namespace and name has left in the destination, or
deletes it, as `output.existing` says.

Its checkpoints are taken over by writing their manifests again, as this job's and with this pod's
signature, so from then on they are like any other. The claim comes last: after a crash, the next
attempt does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import ValidationError

from finetune_api import recipe
from finetune_api.messages.manifest import Manifest, ManifestJob
from finetune_api.messages.run import JobRef, RunConfig
from finetune_api.names import CHECKPOINT_MANIFEST, CHECKPOINTS_DIR, MANIFEST_PATH, checkpoint_dir
from finetune_trainer.destination import claim, file_names
from finetune_trainer.destination.claim import Owner
from finetune_trainer.errors import RunError
from finetune_trainer.paths import split_checkpoint_path
from finetune_trainer.storage.base import Storage


@dataclass(frozen=True)
class Leftovers:
    """Lists what a predecessor has left: the manifests of its checkpoints by step, and its
    result's."""

    checkpoints: Mapping[int, Manifest]
    result: Manifest | None

    def __bool__(self) -> bool:
        return bool(self.checkpoints) or self.result is not None


def manifests(storage: Storage) -> dict[int, Manifest | None]:
    """Returns the manifests of all checkpoints by step; None for one that can't be parsed."""
    files = (split_checkpoint_path(entry.path) for entry in storage.list(CHECKPOINTS_DIR))
    steps = sorted({file[0] for file in files if file is not None and file[1] == CHECKPOINT_MANIFEST}, reverse=True)
    return {step: parse(storage.read(f"{checkpoint_dir(step)}/{CHECKPOINT_MANIFEST}")) for step in steps}


def release_if_empty(storage: Storage, job: JobRef) -> None:
    """Gives a destination back in which there is no checkpoint."""
    if not manifests(storage):
        claim.release(storage, job)


def parse(data: bytes | None) -> Manifest | None:
    """Returns the manifest in `data`; None if it isn't one."""
    try:
        return Manifest.model_validate_json(data) if data else None
    except ValidationError:
        return None


def leftovers(checkpoints: Mapping[int, Manifest | None], result: Manifest | None, job: JobRef) -> Leftovers:
    """Returns what belongs to a predecessor of the job."""
    return Leftovers(
        {step: manifest for step, manifest in checkpoints.items() if manifest and is_predecessor(manifest.job, job)},
        result if result and is_predecessor(result.job, job) else None,
    )


def is_predecessor(owner: ManifestJob, job: JobRef) -> bool:
    """Whether a manifest was written by a deleted job of the same namespace and name."""
    return (owner.namespace, owner.name) == (job.namespace, job.name) and owner.uid != job.uid


def check(left: Leftovers, owner: Owner, run: RunConfig, display: str) -> None:
    """Raises RunError(OutputOccupied) unless the job may take over what its predecessor left.

    The message says why not, and which field deletes it.
    """
    if run.existing == "discard" or not left:
        return
    remedy = "choose another output.uri, or set output.existing: discard, which deletes it"
    subject = f"output.uri: {display} has the"
    former = f"{run.job.namespace}/{run.job.name}, a deleted FineTuneJob of the same name"
    if left.result is not None:
        raise RunError("OutputOccupied", f"{subject} result of {former}; {remedy}")
    subject = f"{subject} checkpoint after step {max(left.checkpoints)} of {former}"
    if not run.inherits:
        raise RunError("OutputOccupied", f"{subject}, although this job has stored its own; delete that checkpoint")
    if not owner.recipe or not run.recipe or owner.uid == run.job.uid:
        raise RunError("OutputOccupied", f"{subject}, whose recipe isn't known; {remedy}")
    if changed := recipe.differing(owner.recipe, run.recipe):
        fields = ", ".join(f"spec.{section}" for section in changed)
        raise RunError("OutputOccupied", f"{subject}, but its recipe differs in {fields}; {remedy}")


def take_over(storage: Storage, left: Leftovers, run: RunConfig, sign: Callable[[Manifest], Manifest]) -> None:
    """Makes a predecessor's checkpoints the job's own, or deletes what it left; then claims it."""
    if run.existing == "discard":
        _discard(storage, left)
    elif left:
        job = ManifestJob(namespace=run.job.namespace, name=run.job.name, uid=run.job.uid, attempt=run.job.attempt)
        _delete_incomplete(storage, frozenset(manifests(storage)))
        for step, manifest in left.checkpoints.items():
            own = sign(manifest.model_copy(update={"job": job, "signature": None}))
            data = own.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode()
            storage.write(f"{checkpoint_dir(step)}/{CHECKPOINT_MANIFEST}", data)
    claim.take_over(storage, run.job, run.recipe, claim.cluster(run))


def is_empty(storage: Storage) -> bool:
    """Whether no checkpoint and no result is complete in a destination."""
    return storage.head(MANIFEST_PATH) is None and not manifests(storage)


def delete_parts(storage: Storage) -> None:
    """Deletes the partial checkpoints and the records in a destination that is empty."""
    _delete_incomplete(storage, frozenset())


def _delete_incomplete(storage: Storage, complete: frozenset[int]) -> None:
    """Deletes partial checkpoints, and the files beside them that concern the predecessor only.

    A file whose name no job would give it stays.
    """
    storage.delete(tuple(e.path for e in storage.list(CHECKPOINTS_DIR) if _is_obsolete(e.path, complete)))


def _is_obsolete(path: str, complete: frozenset[int]) -> bool:
    if file_names.is_record(path) or file_names.is_of_tokens(path):
        return True
    step = file_names.step_of(path)
    return step is not None and (step not in complete or path.startswith(f"{checkpoint_dir(step)}/node-"))


def _discard(storage: Storage, left: Leftovers) -> None:
    """Deletes a predecessor's checkpoints, each manifest before its files, and its result, whose
    manifest lists the files for the next try and is deleted last."""
    steps = frozenset(left.checkpoints)
    own = frozenset(manifests(storage)) - steps
    storage.delete(tuple(f"{checkpoint_dir(step)}/{CHECKPOINT_MANIFEST}" for step in steps))
    _delete_incomplete(storage, own)
    if left.result is not None:
        storage.delete(tuple(file.path for file in left.result.files if _is_below(file.path)))
        storage.delete((MANIFEST_PATH,))


def _is_below(path: str) -> bool:
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts
