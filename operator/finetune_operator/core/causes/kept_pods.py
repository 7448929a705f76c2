"""Decides when a pod counts as ended whose trainer has ended. The clock is an argument, and there
is no I/O.

A pod ends with the last of its containers. One that the cluster injects into every pod, such as a
proxy's, doesn't know that the trainer has ended, and runs forever. The trainer's end is what
counts; the pod is removed then, because it holds its GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_operator.core.case import children
from finetune_operator.core.objects import FAILED, SUCCEEDED, Attempt, Observed, Pod, seconds_between

PATIENCE_SECONDS = 60.0
"""For how long other containers may outlive the trainer, for example to send their last logs."""


def with_ended_pods(observed: Observed, now: datetime) -> Observed:
    """Returns the observation in which pods have ended whose trainers ended long ago.

    Nobody waits for those of earlier attempts, whose Jobs are gone.
    """
    if not any(pod.keepers for child in children(observed) for pod in child.pods) and not observed.orphaned_pods:
        return observed
    preflight = observed.preflight
    return replace(
        observed,
        attempts=tuple(marked(attempt, now) for attempt in observed.attempts),
        preflight=marked(preflight, now) if preflight else None,
        orphaned_pods=tuple(pod for pod in observed.orphaned_pods if not pod.keepers),
    )


def seconds_until_ended(observed: Observed, now: datetime) -> float | None:
    """Returns how many seconds from now the next such pod has ended; None if there is none."""
    remaining = (_seconds_left(pod, now) for child in children(observed) for pod in child.pods if pod.keepers)
    return min((seconds for seconds in remaining if seconds > 0), default=None)


def marked(attempt: Attempt, now: datetime) -> Attempt:
    """Returns the attempt, check or cleanup in which such pods have ended."""
    return replace(attempt, pods=tuple(_ended(pod, now) for pod in attempt.pods))


def _ended(pod: Pod, now: datetime) -> Pod:
    if not pod.keepers or pod.termination is None or _seconds_left(pod, now) > 0:
        return pod
    return replace(pod, phase=FAILED if pod.termination.exit_code else SUCCEEDED, abandoned=True)


def _seconds_left(pod: Pod, now: datetime) -> float:
    ended = pod.termination.finished_at if pod.termination else ""
    return PATIENCE_SECONDS - seconds_between(ended, now)
