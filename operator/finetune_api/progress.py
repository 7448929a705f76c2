"""Progress: what rank 0's supervisor posts to the operator, and the operator re-exports and writes to status.

Wire: `POST <url>` with `Authorization: Bearer <projected token, audience PROGRESS_AUDIENCE>` and this as JSON.
200 taken, 401 no valid token, 307 ask the leader, 403 the pod isn't the current attempt's, 413 too
large, 429 too often. Losing one is harmless.
"""

from __future__ import annotations

from pydantic import Field

from finetune_api.model import LenientModel
from finetune_api.status import CheckpointStatus, DataStatus, ModelStatus, OverfittingStatus

MAX_BODY_BYTES = 16384


class GpuSample(LenientModel):
    """One GPU of the posting pod, as NVML tells it."""

    index: int
    utilization_ratio: float | None = Field(default=None, description="0 to 1.")
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None


class Progress(LenientModel):
    """Absolute values, so that a lost or repeated post does no harm."""

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
    reward_margin: float | None = Field(default=None, description="Of objective dpo, as of the last step.")
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
    tokens: int = Field(default=0, description="Tokens trained on so far, padding not counted; all ranks.")
    samples: int = Field(default=0, description="Examples trained on so far; all ranks.")
    eta_seconds: int | None = None
    skipped_steps: int = Field(default=0, description="Steps that changed nothing, of all attempts.")
    overfitting: OverfittingStatus | None = None
    checkpoint: CheckpointStatus | None = None
    model: ModelStatus | None = None
    data: DataStatus | None = None
    gpus: tuple[GpuSample, ...] = ()
