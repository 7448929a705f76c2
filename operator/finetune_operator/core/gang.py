"""Decides when a group that can't be scheduled as a whole gives its nodes back, and tries again.

Kubernetes schedules pods one by one, so two groups may each hold a part of the nodes and wait for
the rest. The Job of such a group is suspended, which deletes its pods without counting them as
failed, and resumed after a growing back-off. When and how often is an annotation of the Job, which
is written together with the suspension. A queue such as Kueue's admits whole groups instead. It
does no I/O.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_operator.core.actions import ReleaseGroup, ResumeGroup
from finetune_operator.core.objects import Attempt, Observed, seconds_between

INCOMPLETE = "GroupIncomplete"
_FIRST_DELAY_SECONDS = 10.0
_LONGEST_DELAY_SECONDS = 300.0
_SPREAD = 0.5  # two groups must not give up, or try again, at the same moment


@dataclass(frozen=True)
class Step:
    """Says what happens to an incomplete group: an action now, or nothing for `wait` seconds."""

    message: str
    action: ReleaseGroup | ResumeGroup | None
    wait: float | None

    @property
    def actions(self) -> tuple[ReleaseGroup | ResumeGroup, ...]:
        """The action, if there is one."""
        return (self.action,) if self.action else ()


def step(observed: Observed, now: datetime) -> Step | None:
    """Returns the step for the newest attempt, which waits or is suspended; None for a queue's."""
    policy, attempt = observed.job.spec.run_policy, observed.current
    if attempt is None or policy.queue_name:
        return None
    if attempt.job.suspended:
        return _released(attempt, now) if attempt.job.released_at else None
    return _incomplete(attempt, policy.scheduling_timeout_seconds, now)


def _incomplete(attempt: Attempt, timeout: float, now: datetime) -> Step | None:
    """Returns the step for a group of which only a part has nodes; None for any other group.

    `timeout` is in seconds, counted from the last pod that got a node. It is extended by up to a
    half, by a random number that depends on the group.
    """
    scheduled = [pod for pod in attempt.pods if pod.is_live and pod.node]
    if timeout == 0 or not 0 < len(scheduled) < attempt.job.expected_pods:
        return None
    since = max(pod.scheduled_at or pod.created for pod in scheduled)
    wait = timeout * (1 + _SPREAD * _random(attempt)) - seconds_between(since, now)
    part = f"{len(scheduled)} of {attempt.job.expected_pods} pods have nodes"
    if wait > 0:
        return Step(f"{part}, which they give back at {_clock(now, wait)} unless all have one by then", None, wait)
    job = attempt.job
    action = ReleaseGroup(job.name, job.uid, job.resource_version, job.releases + 1, now)
    return Step(f"{part}; they give them back, so that another group can run", action, None)


def _released(attempt: Attempt, now: datetime) -> Step:
    """Returns the step for a group that has given its nodes back."""
    job = attempt.job
    delay = min(_FIRST_DELAY_SECONDS * 2.0 ** min(job.releases - 1, 10), _LONGEST_DELAY_SECONDS)
    wait = delay * (1 + _SPREAD * _random(attempt)) - seconds_between(job.released_at, now)
    if wait <= 0:
        return Step("the pods are being created again", ResumeGroup(job.name, job.uid, job.resource_version), None)
    times = "once" if job.releases == 1 else f"{job.releases} times"
    message = (
        f"the next try starts at {_clock(now, wait)}: only a part of {job.expected_pods} pods got nodes, which they "
        f"have given back {times}. Free nodes, or use runPolicy.queueName"
    )
    return Step(message, None, wait)


def _random(attempt: Attempt) -> float:
    """Returns a number from 0 to 1 that is the same in every reconcile, and differs by group."""
    digest = hashlib.sha256(f"{attempt.job.uid}/{attempt.job.releases}".encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32


def _clock(now: datetime, seconds: float) -> str:
    """Formats a time, rounded so that every reconcile names the same one."""
    return f"{now + timedelta(seconds=seconds + 0.5):%H:%M:%S UTC}"
