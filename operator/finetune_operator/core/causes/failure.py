"""Computes status.failure: why an attempt failed, and what a person can do about it.

It does no I/O.
"""

from __future__ import annotations

from finetune_api import reasons
from finetune_api.status import FailureStatus
from finetune_operator.core.objects import Observed
from finetune_operator.core.verdict import Verdict, verdict


def failure_of(verdict: Verdict, attempt: int) -> FailureStatus:
    """Returns status.failure for the verdict on an attempt."""
    result = verdict.result
    return FailureStatus(
        reason=verdict.reason,
        message=verdict.message,
        attempt=attempt,
        rank=result.rank if result else None,
        exit_code=result.exit_code if result else None,
        log_tail=result.log_tail if result else "",
        hint=reasons.hint(verdict.reason),
    )


def last_failure(observed: Observed, number: int) -> FailureStatus | None:
    """Returns the failure of the attempt before `number`; None if there is none.

    It comes from status, or from the attempt itself if a crash prevented it from being written.
    """
    reported = observed.job.status.failure
    if reported and reported.attempt >= number - 1:
        return reported
    for attempt in observed.attempts:
        if attempt.number == number - 1:
            previous = verdict(attempt)
            return failure_of(previous, attempt.number) if previous.state == "failed" else reported
    return reported
