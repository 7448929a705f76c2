"""Decides what to do next for one FineTuneJob and what its status reports.

The clock is an argument, there is no I/O, and nothing is remembered from one reconcile to the next,
so a crash at any line changes no decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_api import reasons
from finetune_api.status import CONDITION_SUSPENDED, TERMINAL_PHASES, FailureStatus, Phase, Restarts, Status
from finetune_operator.core import gang, output, plan, restart_policy
from finetune_operator.core.actions import (
    CHECKING,
    SUSPENDED,
    SUSPENDING,
    CreateAttempt,
    CreatePreflight,
    Decision,
    DeleteJob,
    DesiredStatus,
)
from finetune_operator.core.avoided_nodes import avoided_nodes
from finetune_operator.core.failure import failure_of, last_failure
from finetune_operator.core.objects import Attempt, Observed, seconds_between
from finetune_operator.core.verdict import STARTING, Verdict, verdict

_CHECKING_MESSAGE = "checking the model, the data and the output destination"


@dataclass(frozen=True)
class _Case:
    """Holds what every branch of the decision needs to know."""

    observed: Observed
    now: datetime
    number: int
    restarts: Restarts
    verdict: Verdict | None  # of attempt `number`; None if it has no Job, or no longer has one

    @property
    def status(self) -> Status:
        """The status as it was last written."""
        return self.observed.job.status

    @property
    def children(self) -> list[Attempt]:
        """All attempts that exist, and the preflight check."""
        return _children(self.observed)

    def desired(self, phase: Phase, reason: str, message: str) -> DesiredStatus:
        """Returns the desired status of this attempt; its failure is the previous attempt's."""
        failure = last_failure(self.observed, self.number)
        return DesiredStatus(phase, reason, message, self.number, self.restarts, failure, verdict=self.verdict)


def decide(observed: Observed, now: datetime) -> Decision:
    """Returns the next actions for a job, and the status that it should have afterwards."""
    if observed.job.status.phase in TERMINAL_PHASES:
        return _finished(observed, now)
    case = _case(observed, now)
    if case.verdict and case.verdict.state == "succeeded":
        return Decision(
            case.desired("Succeeded", case.verdict.reason, output.message(case.verdict.result, observed.job))
        )
    if observed.job.spec.run_policy.suspend:
        return _suspend(case)
    remaining = _seconds_to_deadline(case)
    if remaining is not None and remaining <= 0:
        return _deadline_exceeded(case)
    decision = _before_first_attempt(case) if case.number == 0 else _after_first_attempt(case)
    if decision.desired and decision.desired.attempt > case.status.attempt + 1:
        # Only an attempt that follows the one in status is proven to be the job's.
        message = f"recording attempt {case.number} before the next one"
        decision = Decision(case.desired("Restarting", STARTING, message), status_first=True)
    return replace(decision, requeue_after=_earlier(decision.requeue_after, remaining))


def failed_to_start(observed: Observed, desired: DesiredStatus, reason: str, message: str) -> DesiredStatus:
    """Returns the status if a child can't be created and only a person can fix the cause."""
    number, restarts = _newest_attempt(observed)
    failure = FailureStatus(reason=reason, message=message, attempt=number, hint=reasons.hint(reason))
    return replace(
        desired,
        phase="Failed",
        reason=reason,
        message=message,
        attempt=number,
        restarts=restarts,
        failure=failure,
        verdict=None,
    )


def blocked(observed: Observed, desired: DesiredStatus, message: str, reason: str = "Blocked") -> DesiredStatus:
    """Returns the status while a child can't be created yet; creation is retried."""
    number, restarts = _newest_attempt(observed)
    return replace(desired, phase="Pending", reason=reason, message=message, attempt=number, restarts=restarts)


def _case(observed: Observed, now: datetime) -> _Case:
    number, restarts = _newest_attempt(observed)
    current = observed.current
    current_verdict = verdict(current, observed.warning_events) if current and current.number == number else None
    return _Case(observed, now, number, restarts, current_verdict)


def _newest_attempt(observed: Observed) -> tuple[int, Restarts]:
    """Returns the number of the newest attempt and its restart counters.

    The newest attempt is that of status or of the newest Job, whichever is later. Its counters are
    an annotation of its Job, so they are created together with it.
    """
    current, status = observed.current, observed.job.status
    if current and current.number >= status.attempt:
        return current.number, current.job.restarts
    return status.attempt, status.restarts


def _before_first_attempt(case: _Case) -> Decision:
    if case.observed.orphaned_pods:
        return _wait_for_orphaned_pods(case)
    if not plan.needs_preflight(case.observed.job.spec):
        return _create(case, case.restarts, "Starting", "pods are being created")
    check = case.observed.preflight
    if check is None:
        return Decision(case.desired("Pending", CHECKING, _CHECKING_MESSAGE), (CreatePreflight(),))
    preflight = verdict(check, case.observed.warning_events)
    case = replace(case, verdict=preflight)
    if preflight.state == "succeeded":
        return _create(case, case.restarts, "Starting", "preflight passed; pods are being created")
    if preflight.state == "failed":
        return Decision(_failed(case, preflight, preflight.reason))
    if preflight.state == "queued":
        return Decision(case.desired("Queued", preflight.reason, preflight.message))
    if preflight.state == "waiting" and preflight.reason != STARTING:
        return Decision(case.desired("Pending", preflight.reason, f"preflight is waiting: {preflight.message}"))
    return Decision(case.desired("Pending", CHECKING, _CHECKING_MESSAGE))


def _after_first_attempt(case: _Case) -> Decision:
    current = case.verdict
    if case.observed.orphaned_pods:
        return _wait_for_orphaned_pods(case)
    if _suspended_at(case) and (current is None or current.state == "failed"):
        return _create(case, case.restarts, "Starting", "resuming after suspension")
    if current is None:
        message = f"the Job of attempt {case.number} was deleted"
        return _restart(case, Verdict("failed", "PodDeleted", message), lifetime=0.0, ended=math.inf)
    if current.state == "failed":
        job = case.observed.current.job if case.observed.current else None
        created, finished = (job.created, job.finished_at) if job else ("", "")
        ended = seconds_between(finished or created, case.now)
        return _restart(case, current, lifetime=seconds_between(created, case.now) - ended, ended=ended)
    if current.state == "running":
        return Decision(case.desired("Running", "Running", current.message))
    step = gang.step(case.observed, case.now) if current.state in ("queued", "waiting") else None
    if current.state == "queued" and step:
        desired = case.desired("Queued", gang.INCOMPLETE, step.message)
        return Decision(desired, step.actions, requeue_after=step.wait)
    if current.state == "queued":
        return Decision(case.desired("Queued", current.reason, current.message))
    if current.state == "ending":
        return Decision(case.desired("Running", current.reason, current.message))
    message = f"{current.message}; {step.message}" if step else current.message
    phase: Phase = "Pending" if current.reason != STARTING else _starting_phase(case.number)
    desired = case.desired(phase, current.reason, message)
    return Decision(desired, step.actions if step else (), requeue_after=step.wait if step else None)


def _restart(case: _Case, verdict: Verdict, lifetime: float, ended: float) -> Decision:
    """Starts the next attempt, waits for its back-off, or gives up.

    `lifetime` is how long the attempt existed and `ended` is how long ago it ended, both in
    seconds; `ended` is infinite if the time isn't known, so that no back-off delays the restart.
    """
    budget = case.observed.job.spec.run_policy.max_restarts
    restart = restart_policy.next_attempt(verdict.cause, case.restarts, budget, lifetime)
    if isinstance(restart, restart_policy.GiveUp):
        reason = "RestartBudgetSpent" if restart.budget else verdict.reason
        return Decision(_failed(case, verdict, reason))
    case = replace(case, verdict=verdict)
    wait = restart.delay - ended
    message = f"attempt {case.number} ended: {verdict.reason}: {verdict.message}"
    if wait > 0:
        # The time is rounded, so that every reconcile reports the same one.
        start = case.now + timedelta(seconds=wait + 0.5)
        message = f"attempt {case.number + 1} starts at {start:%H:%M:%S UTC}; {message}"
        desired = replace(case.desired("Restarting", verdict.reason, message), failure=failure_of(verdict, case.number))
        return Decision(desired, requeue_after=wait)
    return _create(case, restart.restarts, "Restarting", message, verdict)


def _create(case: _Case, restarts: Restarts, phase: Phase, message: str, after: Verdict | None = None) -> Decision:
    """Creates the next attempt; `after` is the verdict on the failed attempt that it replaces.

    Only the two newest attempts are kept for inspection; older Jobs are deleted.
    """
    number = case.number + 1
    old = tuple(
        _delete(attempt, wait=False)
        for attempt in case.observed.attempts
        if attempt.number < number - 1 and not attempt.job.deleting
    )
    failure = failure_of(after, case.number) if after else last_failure(case.observed, case.number)
    desired = DesiredStatus(phase, STARTING, message, number, restarts, failure, verdict=case.verdict)
    return Decision(desired, (CreateAttempt(number, restarts, avoided_nodes(case.observed.attempts)), *old))


def _suspend(case: _Case) -> Decision:
    """Announces the suspension in status, then deletes the pods, then reports it as done.

    In this order a crash in between costs no restart.
    """
    live = [child for child in case.children if child.is_live]
    if not live and not case.observed.orphaned_pods:
        desired = case.desired("Suspended", SUSPENDED, "spec.runPolicy.suspend is true; no pods are running")
        return Decision(replace(desired, suspension=SUSPENDED))
    if case.verdict and case.verdict.state == "failed" and case.verdict.cause == "user":
        return Decision(_failed(case, case.verdict, case.verdict.reason))
    message = "the pods are saving a checkpoint before they stop"
    desired = case.desired("Running" if case.number else "Pending", SUSPENDING, message)
    actions = tuple(_delete(child, wait=True) for child in live if not child.job.deleting)
    return Decision(replace(desired, suspension=SUSPENDING), actions, status_first=bool(actions))


def _deadline_exceeded(case: _Case) -> Decision:
    seconds = case.observed.job.spec.run_policy.active_deadline_seconds
    message = (
        f"spec.runPolicy.activeDeadlineSeconds: {seconds} s passed before the job finished; raise it or use more GPUs"
    )
    live = [child for child in case.children if child.is_live]
    if live or case.observed.orphaned_pods:
        actions = tuple(_delete(child, wait=True) for child in live if not child.job.deleting)
        return Decision(case.desired("Running" if case.number else "Pending", "DeadlineExceeded", message), actions)
    return Decision(_failed(case, Verdict("failed", "DeadlineExceeded", message), "DeadlineExceeded"))


def _finished(observed: Observed, now: datetime) -> Decision:
    """Keeps a finished job finished; its Jobs and pods are deleted after their time to live."""
    ttl = observed.job.spec.run_policy.ttl_seconds_after_finished
    children = _children(observed)
    if ttl == 0 or not children:
        return Decision(None)
    remaining = ttl - seconds_between(observed.job.status.completion_time or "", now)
    if remaining > 0:
        return Decision(None, requeue_after=remaining)
    return Decision(None, tuple(_delete(child, wait=False) for child in children if not child.job.deleting))


def _children(observed: Observed) -> list[Attempt]:
    return [*observed.attempts, *([observed.preflight] if observed.preflight else [])]


def _wait_for_orphaned_pods(case: _Case) -> Decision:
    pods = ", ".join(pod.name for pod in case.observed.orphaned_pods[:3])
    message = f"waiting for pods of an earlier attempt to stop: {pods}"
    return Decision(case.desired("Running" if case.number else "Pending", "PodsEnding", message))


def _failed(case: _Case, verdict: Verdict, reason: str) -> DesiredStatus:
    failure = failure_of(verdict, case.number)
    desired = case.desired("Failed", reason, verdict.message)
    return replace(desired, failure=failure, verdict=verdict)


def _suspended_at(case: _Case) -> bool:
    """Whether this attempt's pods were deleted because of spec.runPolicy.suspend."""
    return case.status.attempt == case.number and any(
        condition.type == CONDITION_SUSPENDED and condition.reason in (SUSPENDING, SUSPENDED)
        for condition in case.status.conditions
    )


def _seconds_to_deadline(case: _Case) -> float | None:
    deadline = case.observed.job.spec.run_policy.active_deadline_seconds
    start = case.status.start_time or (case.observed.attempts[0].job.created if case.observed.attempts else "")
    return deadline - seconds_between(start, case.now) if deadline and start else None


def _delete(attempt: Attempt, wait: bool) -> DeleteJob:
    return DeleteJob(attempt.job.name, attempt.job.uid, attempt.job.resource_version, wait)


def _starting_phase(number: int) -> Phase:
    return "Starting" if number <= 1 else "Restarting"


def _earlier(first: float | None, second: float | None) -> float | None:
    delays = [seconds for seconds in (first, second) if seconds is not None]
    return min(delays) if delays else None
