"""Defines Result, the JSON in a trainer pod's termination message (at most 4096 bytes)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError

from finetune_api import untrusted as u
from finetune_api.base import LenientModel
from finetune_api.status import ArtifactStatus, CheckpointStatus, DataStatus, EvaluationStatus, ModelStatus

LIMIT_BYTES = 4096


class Result(LenientModel):
    """Says how a pod's part of an attempt, or a preflight check, ended."""

    outcome: Literal["succeeded", "failed", "preempted"]
    reason: u.ReasonName = Field(
        default="", description="A name in reasons.REASONS; empty if the outcome is succeeded."
    )
    message: u.Line = ""
    rank: u.Rank | None = None
    exit_code: u.ExitCode | None = Field(default=None, description="Exit code of that rank; 128 + n means signal n.")
    log_tail: u.Lines = ""
    step: u.Count | None = None
    total_steps: u.Count | None = None
    checkpoint: CheckpointStatus | None = None
    artifact: ArtifactStatus | None = None
    evaluation: EvaluationStatus | None = None
    signer: u.ShortLine | None = Field(
        default=None, description="Public key by which the pod signed manifests, or tokens."
    )
    model: ModelStatus | None = None
    data: DataStatus | None = None


def encode(result: Result) -> str:
    """Encodes a result as JSON of at most LIMIT_BYTES bytes.

    If it is too long, the beginning of the log, the end of the message and the statistics of the
    rows are left out.
    """
    for log_chars, message_chars in ((2000, 1000), (1000, 800), (300, 500), (0, 300)):
        shortened = result.model_copy(
            update={
                "log_tail": _last_lines(result.log_tail, log_chars),
                "message": result.message[:message_chars],
                "data": result.data if log_chars > 300 else None,  # the data report has them all
            }
        )
        text = shortened.model_dump_json(by_alias=True, exclude_none=True)
        if len(text.encode()) <= LIMIT_BYTES:
            return text
    least = Result(outcome=result.outcome, reason=result.reason, message=result.message[:200], signer=result.signer)
    return least.model_dump_json(by_alias=True, exclude_none=True)


def _last_lines(text: str, chars: int) -> str:
    """Returns the last lines that fit into `chars` characters; a longer last line is cut."""
    if len(text) <= chars:
        return text
    end = text[len(text) - chars :]
    starts_a_line = text[len(text) - chars - 1] == "\n"
    return end if starts_a_line else end.partition("\n")[2] or end


def decode(text: str | None) -> Result | None:
    """Parses a termination message; None if it isn't a result, e.g. because the pod was killed."""
    if not text or len(text) > 2 * LIMIT_BYTES:
        return None
    try:
        result = Result.model_validate_json(text)
    except (ValidationError, RecursionError):
        return None
    return None if result.step and result.total_steps and result.step > result.total_steps else result
