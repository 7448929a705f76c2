"""Says whether what a pod reports lies in the job's own output, else it isn't believed.

A pod, or somebody who can write its termination message, may name any place. There is no I/O.
"""

from __future__ import annotations

from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.resource import FineTuneJob
from finetune_api.status import ArtifactStatus, CheckpointStatus


def artifact(result: Result | None, job: FineTuneJob) -> ArtifactStatus | None:
    """Returns the artifact of a result; None if there is none at spec.output.uri."""
    reported = result.artifact if result else None
    return reported if reported and reported.uri.rstrip("/") == job.spec.output.uri.rstrip("/") else None


def contains(job: FineTuneJob, checkpoint: CheckpointStatus | None) -> bool:
    """Whether a checkpoint is one of the output's."""
    folder = f"{job.spec.output.uri.rstrip('/')}/{names.CHECKPOINTS_DIR}/"
    return checkpoint is not None and checkpoint.uri.startswith(folder)


def message(result: Result | None, job: FineTuneJob) -> str:
    """Returns what a job that has succeeded says of its result."""
    if result is None or result.artifact is None:
        return "training is complete"
    if artifact(result, job) is None:
        return "training is complete; the pod names a result outside of spec.output.uri, which isn't believed"
    headline = result.evaluation.headline if result.evaluation else ""
    return f"the result is in {job.spec.output.uri}{headline and f'; {headline}'}"
