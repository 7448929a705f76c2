"""Computes the status of a job that is in trouble of its own: it says so, and keeps what decisions
need. The clock is an argument, and there is no I/O.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_api import untrusted as u
from finetune_api.status import FailureStatus, Phase, Status
from finetune_operator.core.actions import DesiredStatus
from finetune_operator.core.case import open_deed
from finetune_operator.core.status import MAX_MESSAGE_CHARACTERS, conditions, timestamp

STATUS_REFUSED = "StatusRefused"
OPERATOR_ERROR = "OperatorError"
OPERATOR_TOO_OLD = "OperatorTooOld"
SPEC_UNREADABLE = "SpecUnreadable"


def hindered(before: Status, generation: int, reason: str, message: str, now: datetime) -> Status:
    """Returns the status of a job that the operator can't continue for now; its phase remains."""
    text = u.line(message)
    waiting = _desired(before, "Pending", reason, text)
    return before.model_copy(
        update={
            "message": u.shortened(text, MAX_MESSAGE_CHARACTERS),
            "conditions": conditions(before, generation, waiting, timestamp(now)),
        }
    )


def stalled(before: Status, generation: int, reason: str, message: str, now: datetime) -> Status:
    """Returns the status of a job that waits for another version of the operator.

    Its phase remains, as do its pods.
    """
    text = u.line(message)
    waiting = replace(_desired(before, before.phase, reason, text), stalled=True)
    return before.model_copy(
        update={
            "observed_generation": generation,
            "reason": reason,
            "message": u.shortened(text, MAX_MESSAGE_CHARACTERS),
            "conditions": conditions(before, generation, waiting, timestamp(now)),
        }
    )


def _desired(before: Status, phase: Phase, reason: str, message: str) -> DesiredStatus:
    """Returns what is reported of a job about which nothing else has changed."""
    deed = open_deed(before, before.attempt)
    return DesiredStatus(phase, reason, message, before.attempt, before.restarts, before.failure, suspension=deed)


def refused(after: Status, error: str) -> Status:
    """Returns what is written instead of a status that the API server refuses.

    It lacks all texts and figures that pods, users or the cluster have contributed.
    """
    message = u.line(f"{after.phase}; the API server refuses the full status: {error}", 512)
    failure = after.failure and FailureStatus(
        reason=after.failure.reason, attempt=after.failure.attempt, exit_code=after.failure.exit_code,
        hint=after.failure.hint,
    )  # fmt: skip
    return Status(
        observed_generation=after.observed_generation,
        phase=after.phase,
        reason=after.reason,
        message=u.shortened(message, MAX_MESSAGE_CHARACTERS),
        conditions=tuple(
            condition.model_copy(update={"message": message if condition.status == "True" else ""})
            for condition in after.conditions
        ),
        start_time=after.start_time,
        completion_time=after.completion_time,
        paused_since=after.paused_since,
        paused_seconds=after.paused_seconds,
        retry=after.retry,
        attempt=after.attempt,
        gpus=after.gpus,
        restarts=after.restarts,
        restarts_total=after.restarts_total,
        failure=failure,
        artifact=after.artifact,
        signers=after.signers,
        token_signers=after.token_signers,
    )
