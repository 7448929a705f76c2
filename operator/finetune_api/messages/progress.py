"""Defines Progress, which rank 0's supervisor posts and the operator exports as metrics and writes
to status.

Protocol: `POST <url>` with `Authorization: Bearer <projected token, audience PROGRESS_AUDIENCE>`
and this model as JSON. Responses: 200 accepted, 307 redirected to the leader, 400 invalid, 401
invalid token, 403 the pod doesn't belong to the current attempt, 413 too large, 429 too many posts,
503 no leader at the moment. Losing a post is harmless.
"""

from __future__ import annotations

from pydantic import Field

from finetune_api.base import LenientModel
from finetune_api.status import CheckpointStatus, DataStatus, ModelStatus, OverfittingStatus, StragglerStatus

MAX_BODY_BYTES = 16384


class GpuSample(LenientModel):
    """Holds NVML's figures for one GPU of the posting pod."""

    index: int
    uuid: str | None = None
    utilization_ratio: float | None = Field(default=None, description="0 to 1.")
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None


class Progress(LenientModel):
    """Reports an attempt's state in absolute values, so a lost or repeated post does no harm."""

    attempt: int
    phase: str = Field(
        default="starting",
        description="fetching, checking, loading, tokenizing, training, evaluating, saving, uploading, done",
    )
    message: str = ""
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    train_loss: float | None = None
    eval_loss: float | None = None
    reward_margin: float | None = Field(default=None, description="With objective dpo: the margin of the last step.")
    reward_accuracy: float | None = None
    eval_reward_margin: float | None = None
    eval_reward_accuracy: float | None = None
    test_reward_margin: float | None = None
    test_reward_accuracy: float | None = None
    test_loss_before: float | None = None
    test_loss_after: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    tokens: int = Field(default=0, description="Tokens that all ranks have trained on so far, without padding.")
    samples: int = Field(default=0, description="Examples that all ranks have trained on so far.")
    eta_seconds: int | None = None
    skipped_steps: int = Field(default=0, description="Steps of all attempts that were skipped or rolled back.")
    straggler: StragglerStatus | None = None
    overfitting: OverfittingStatus | None = None
    checkpoint: CheckpointStatus | None = None
    model: ModelStatus | None = None
    data: DataStatus | None = None
    gpus: tuple[GpuSample, ...] = ()
