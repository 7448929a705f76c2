"""Result: the last word of a trainer pod, as JSON in its termination message (at most 4096 bytes).

Written by finetune_trainer's supervisor, read by finetune_operator.judge. Pure.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError

from finetune_api.model import LenientModel
from finetune_api.status import ArtifactStatus, CheckpointStatus, DataStatus, EvaluationStatus, ModelStatus

LIMIT_BYTES = 4096


class Result(LenientModel):
    """How a pod's part of an attempt (or a preflight check) ended."""

    outcome: Literal["succeeded", "failed", "preempted"]
    reason: str = Field(default="", description="A name of reasons.REASONS unless it succeeded.")
    message: str = ""
    rank: int | None = None
    exit_code: int | None = Field(default=None, description="Of the rank; 128 + n is signal n.")
    log_tail: str = ""
    step: int | None = None
    total_steps: int | None = None
    checkpoint: CheckpointStatus | None = None
    artifact: ArtifactStatus | None = None
    evaluation: EvaluationStatus | None = None
    model: ModelStatus | None = None
    data: DataStatus | None = None


def encode(result: Result) -> str:
    """JSON of at most LIMIT_BYTES bytes: the log's beginning goes first, then the message's end, then
    what the rows turned out to be."""
    for log_chars, message_chars in ((2000, 1000), (1000, 800), (300, 500), (0, 300)):
        cut = result.model_copy(
            update={
                "log_tail": result.log_tail[-log_chars:] if log_chars else "",
                "message": result.message[:message_chars],
                "data": result.data if log_chars > 300 else None,  # the data report has it all
            }
        )
        text = cut.model_dump_json(by_alias=True, exclude_none=True)
        if len(text.encode()) <= LIMIT_BYTES:
            return text
    return Result(outcome=result.outcome, reason=result.reason, message=result.message[:200]).model_dump_json(
        by_alias=True, exclude_none=True
    )


def decode(text: str | None) -> Result | None:
    """The result in a termination message, or None where there is none (a pod that died hard)."""
    if not text:
        return None
    try:
        return Result.model_validate_json(text)
    except ValidationError:
        return None
