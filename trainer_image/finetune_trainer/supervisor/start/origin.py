"""Finds, checks and downloads the checkpoint or the adapter of another job from which a job starts.

Nothing is written to the other job's output. Its files count if they have the digests of their
manifest; who has signed that can't be known, so naming the place means trusting it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.messages.events import OriginEvent
from finetune_api.messages.manifest import Manifest
from finetune_api.messages.run import RunConfig, StartConfig
from finetune_api.names import CHECKPOINT_MANIFEST, MANIFEST_PATH, checkpoint_dir
from finetune_trainer.destination import predecessor
from finetune_trainer.errors import RunError
from finetune_trainer.manifest import of_bytes
from finetune_trainer.storage.base import Storage
from finetune_trainer.storage.schemes import Access, open_folder
from finetune_trainer.supervisor import download
from finetune_trainer.supervisor.start.compatibility import differences

_ADAPTER = "adapter_model.safetensors"

Report = Callable[[str], None]
"""A function that receives a sentence about the progress."""


@dataclass(frozen=True)
class Origin:
    """Describes a checkpoint (`folder` is its path) or an adapter (`folder` is empty) of another
    job. `data` are the bytes of its manifest."""

    storage: Storage
    folder: str
    manifest: Manifest
    data: bytes

    @property
    def uri(self) -> str:
        """Its location, as the user writes it."""
        return f"{self.storage.display.rstrip('/')}/{self.folder}".rstrip("/")

    def event(self, use: str) -> OriginEvent:
        """Returns the line of the history that says where the run started."""
        job, is_continued = self.manifest.job, use == "trainingState"
        return OriginEvent(
            time=time.time(),
            step=self.manifest.step if is_continued else 0,
            use="trainingState" if is_continued else "weights",
            uri=self.uri,
            job=f"{job.namespace}/{job.name}",
            uid=job.uid,
            checkpoint_step=self.manifest.step,
            manifest_digest=f"sha256:{of_bytes(self.data)}",
        )


def find(run: RunConfig, access: Access, digest: str | None, report: Report) -> Origin | None:
    """Returns where the job starts; None if that is the base model.

    `digest` is that of the base model's files, None if its weights haven't been read. Raises
    RunError(CheckpointInvalid) if there is nothing, or nothing that fits the job.
    """
    start = run.model.checkpoint
    if start is None:
        return None
    origin = _select(open_folder(start.location, "checkpoint", access), start)
    if origin.manifest.job.uid == run.job.uid:
        raise _invalid(f"{origin.uri} is this job's own", "name the output of another job")
    if clauses := differences(origin.manifest.provenance, run, digest):
        remedy = "create a job with the same values"
        if start.use == "trainingState":
            remedy += ", or start from its weights alone with model.checkpoint.use: weights"
        raise _invalid(f"{origin.uri} doesn't fit this job: {'; '.join(clauses)}", remedy)
    steps = run.training.max_steps
    if start.use == "trainingState" and steps is not None and steps <= origin.manifest.step:
        raise _invalid(
            f"{origin.uri} was saved after step {origin.manifest.step}, and training.maxSteps is {steps}",
            "set it to more steps, which include those of the other job",
        )
    job = origin.manifest.job
    what = "the training state" if start.use == "trainingState" else "the weights"
    report(f"starting from {what} of {job.namespace}/{job.name} after step {origin.manifest.step}: {origin.uri}")
    return origin


def fetch(origin: Origin, target: Path) -> None:
    """Downloads what its manifest lists to `target`, of an adapter the weights only.

    Raises RunError(CheckpointInvalid) if a file differs from its entry.
    """
    manifest = origin.manifest
    if not origin.folder:
        weights = tuple(file for file in manifest.files if file.path == _ADAPTER)
        manifest = manifest.model_copy(update={"files": weights})
    damage = download.download_verified(origin.storage, origin.folder, manifest, target)
    if damage is not None:
        shutil.rmtree(target, ignore_errors=True)
        raise _invalid(f"{origin.uri} is damaged: {damage}", "name another checkpoint")
    (target / CHECKPOINT_MANIFEST).write_bytes(origin.data)


def _select(storage: Storage, start: StartConfig) -> Origin:
    checkpoints = predecessor.manifests(storage)
    result = predecessor.parse(storage.read(MANIFEST_PATH))
    if start.step is None and start.use == "weights" and result is not None and result.kind == "adapter":
        return _origin(storage, "", MANIFEST_PATH)
    complete = tuple(step for step, manifest in checkpoints.items() if manifest is not None)
    if start.step is not None and start.step not in complete:
        listed = ", ".join(str(step) for step in complete[:8]) or "none"
        raise _invalid(
            f"{storage.display} has no complete checkpoint after step {start.step}; it has: {listed}{_hint(result)}",
            "name another step",
        )
    if not complete:
        raise _invalid(
            f"{storage.display} has no complete checkpoint{_hint(result)}",
            "name the output of a job that hasn't succeeded, or, with use: weights, of one that has trained an adapter",
        )
    folder = checkpoint_dir(start.step if start.step is not None else complete[0])
    return _origin(storage, folder, f"{folder}/{CHECKPOINT_MANIFEST}")


def _origin(storage: Storage, folder: str, path: str) -> Origin:
    data = storage.read(path)
    manifest = predecessor.parse(data)
    if data is None or manifest is None:
        raise _invalid(f"{storage.display}/{path} was deleted or replaced", "name another checkpoint")
    return Origin(storage, folder, manifest, data)


def _hint(result: Manifest | None) -> str:
    if result is None:
        return ""
    named = f"{result.job.namespace}/{result.job.name} has succeeded and left its result only"
    return f"; {named}" if result.kind == "adapter" else f"; {named}, a full model, which model.uri can name"


def _invalid(problem: str, remedy: str) -> RunError:
    return RunError("CheckpointInvalid", f"model.checkpoint: {problem}; {remedy}")
