"""Defines Progress, which rank 0's supervisor posts and the operator exports as metrics and writes
to status.

Protocol: `POST <url>` with `Authorization: Bearer <projected token, audience PROGRESS_AUDIENCE>`
and this model as JSON. Responses: 200 accepted, 307 redirected to the leader, 400 invalid, 401
invalid token, 403 the pod doesn't belong to the current attempt, 413 too large, 429 too many posts,
503 no leader at the moment. Losing a post is harmless.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from finetune_api import untrusted as u
from finetune_api.base import LenientModel
from finetune_api.status import (
    MAX_SIGNERS,
    ArtifactStatus,
    CheckpointStatus,
    DataStatus,
    ModelStatus,
    OverfittingStatus,
    StragglerStatus,
)

MAX_BODY_BYTES = 16384
MAX_GPUS = 16  # of one pod

Phase = Literal[
    "starting", "fetching", "checking", "loading", "tokenizing", "training", "evaluating", "saving", "uploading",
    "done", "other",
]  # fmt: skip
_PHASES = get_args(Phase)


def _known_phase(value: Any) -> Any:
    """Returns a phase; one of another version is `other`, so that a metric has few values."""
    return "other" if isinstance(value, str) and value not in _PHASES else value


class GpuSample(LenientModel):
    """Holds NVML's figures for one GPU of the posting pod."""

    index: Annotated[int, Field(ge=0, lt=MAX_GPUS)]
    uuid: u.Line | None = None
    utilization_ratio: u.Ratio | None = Field(default=None, description="0 to 1.")
    memory_used_bytes: u.Count | None = None
    memory_total_bytes: u.Count | None = None


class Storing(LenientModel):
    """Says whether the output accepts checkpoints and the result."""

    reason: u.ReasonName = Field(default="", description="A name in reasons.REASONS; empty if it does.")
    message: u.Line = Field(default="", description="The words of the storage, and what follows from them.")
    since: u.Time | None = Field(default=None, description="When the first of these failures occurred.")
    failures: u.Count = Field(default=0, description="Uploads that have failed since then.")
    steps_at_risk: u.Count = Field(default=0, description="Steps that a failure of the pod would lose now.")


class Progress(LenientModel):
    """Reports an attempt's state in absolute values, so a lost or repeated post does no harm."""

    attempt: u.Count
    phase: Annotated[Phase, BeforeValidator(_known_phase)] = "starting"
    message: u.Line = ""
    step: u.Count = 0
    total_steps: u.Count = 0
    epoch: u.Figure = 0.0
    train_loss: u.Figure | None = None
    eval_loss: u.Figure | None = None
    reward_margin: u.Figure | None = Field(default=None, description="With objective dpo: the margin of the last step.")
    reward_accuracy: u.Ratio | None = None
    eval_reward_margin: u.Figure | None = None
    eval_reward_accuracy: u.Ratio | None = None
    test_reward_margin: u.Figure | None = None
    test_reward_accuracy: u.Ratio | None = None
    test_loss_before: u.Figure | None = None
    test_loss_after: u.Figure | None = None
    learning_rate: u.Figure | None = None
    grad_norm: u.Figure | None = None
    tokens_per_second: u.Figure | None = None
    tokens: u.Count = Field(default=0, description="Tokens that all ranks have trained on so far, without padding.")
    samples: u.Count = Field(default=0, description="Examples that all ranks have trained on so far.")
    eta_seconds: u.Count | None = None
    skipped_steps: u.Count = Field(default=0, description="Steps of all attempts that were skipped or rolled back.")
    straggler: StragglerStatus | None = None
    overfitting: OverfittingStatus | None = None
    checkpoint: CheckpointStatus | None = None
    storing: Storing | None = None
    artifact: ArtifactStatus | None = Field(default=None, description="The result, once it is complete in the output.")
    signer: u.ShortLine | None = Field(default=None, description="Public key by which the pod signs manifests.")
    model: ModelStatus | None = None
    data: DataStatus | None = None
    gpus: Annotated[tuple[GpuSample, ...], u.at_most(MAX_GPUS)] = ()


class PostAnswer(LenientModel):
    """Is the body of a 200 response."""

    signers: Annotated[tuple[u.ShortLine, ...], u.at_most(MAX_SIGNERS)] = Field(
        default=(), description="Public keys by which the pods of this job have signed their manifests."
    )


def decode(body: bytes) -> Progress:
    """Parses a post.

    Raises ValueError, whose message names the field: pydantic's, or that of a value which
    contradicts another one.
    """
    progress = Progress.model_validate_json(body)
    if 0 < progress.total_steps < progress.step:
        raise ValueError(f"step: {progress.step} is more than totalSteps, {progress.total_steps}")
    checkpoint = progress.checkpoint
    if checkpoint and 0 < progress.total_steps < checkpoint.step:
        raise ValueError(f"checkpoint.step: {checkpoint.step} is more than totalSteps, {progress.total_steps}")
    if len({gpu.index for gpu in progress.gpus}) < len(progress.gpus):
        raise ValueError("gpus: lists a GPU twice")
    return progress
