"""Decides what to do next for one FineTuneJob and what its status reports.

The clock is an argument, there is no I/O, and nothing is remembered from one reconcile to the next,
so a crash at any line changes no decision.
"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timedelta

from finetune_api import reasons
from finetune_api.status import TERMINAL_PHASES, FailureStatus, Phase, Restarts
from finetune_operator.core import gang, plan, restart_policy, stopping
from finetune_operator.core.actions import (
    CHECKING,
    DEADLINE,
    NODE_SILENT,
    REPLACING,
    RETRYING,
    SUSPENDED,
    SUSPENDING,
    CreateAttempt,
    CreatePreflight,
    Decision,
    DeleteJob,
    DesiredStatus,
)
from finetune_operator.core.avoided_nodes import avoided_nodes
from finetune_operator.core.case import (
    Case,
    case_of,
    delete,
    newest_attempt,
    open_deed,
    result_message,
    seconds_to_deadline,
)
from finetune_operator.core.causes import kept_pods, lost_nodes
from finetune_operator.core.causes.failure import failure_of, last_failure
from finetune_operator.core.objects import Observed, seconds_between
from finetune_operator.core.verdict import STARTING, Verdict, verdict

_CHECKING_MESSAGE = "checking the model, the data and the output destination"
_RESUMES = {
    SUSPENDING: "resuming after suspension",
    SUSPENDED: "resuming after suspension",
    DEADLINE: "resuming, because the deadline was raised",
    REPLACING: "the pods are created again, because the spec or the chart has changed before they started",
    RETRYING: "trying again, because spec.runPolicy.retry was raised",
}


def decide(observed: Observed, now: datetime) -> Decision:
    """Returns the next actions for a job, and the status that it should have afterwards."""
    observed = kept_pods.with_ended_pods(lost_nodes.with_lost_pods(observed, now), now)
    decision = _requeued(_decision(observed, now), kept_pods.seconds_until_ended(observed, now))
    return _without_old_attempts(observed, decision)


def _decision(observed: Observed, now: datetime) -> Decision:
    if observed.job.status.phase in TERMINAL_PHASES:
        return stopping.finished(observed, now)
    case = case_of(observed, now)
    if case.verdict and case.verdict.state == "succeeded":
        return Decision(case.desired("Succeeded", case.verdict.reason, result_message(case)))
    lost_after = lost_nodes.seconds_until_lost(observed, now)
    if observed.job.spec.run_policy.suspend:
        return _requeued(stopping.suspend(case), lost_after)
    remaining = seconds_to_deadline(case)
    if remaining is not None and remaining <= 0:
        return _requeued(stopping.deadline_exceeded(case), lost_after)
    decision = stopping.replace_outdated(case) or stopping.end_lost(case)
    if decision is None:
        decision = _before_first_attempt(case) if case.number == 0 else _after_first_attempt(case)
    if decision.desired and decision.desired.attempt > case.status.attempt + 1:
        # Only an attempt that follows the one in status is proven to be the job's.
        message = f"recording attempt {case.number} before the next one"
        decision = Decision(case.desired("Restarting", STARTING, message), status_first=True)
    return _requeued(_with_lost_nodes(case, decision, lost_after), lost_after, remaining)


def failed_to_start(observed: Observed, desired: DesiredStatus, reason: str, message: str) -> DesiredStatus:
    """Returns the status if a child can't be created and only a person can fix the cause."""
    number, restarts = newest_attempt(observed)
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
    number, restarts = newest_attempt(observed)
    deed = open_deed(observed.job.status, number)
    return replace(
        desired, phase="Pending", reason=reason, message=message, attempt=number, restarts=restarts, suspension=deed
    )


def _before_first_attempt(case: Case) -> Decision:
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
    if preflight.state == "failed" and case.own_deed == RETRYING:
        desired = case.desired("Pending", CHECKING, _RESUMES[RETRYING], RETRYING)
        return Decision(desired, (delete(check, wait=False),))
    if preflight.state == "failed" and any(pod.lost for pod in check.pods):
        message = f"the check is repeated, because its node is lost: {preflight.message}"
        actions = () if check.job.deleting else (delete(check, wait=False),)
        return Decision(case.desired("Pending", CHECKING, message), actions)
    if preflight.state == "failed":
        return Decision(stopping.check_failed(case, preflight))
    if preflight.state == "queued":
        return Decision(case.desired("Queued", preflight.reason, preflight.message))
    if preflight.state == "waiting" and preflight.reason != STARTING:
        return Decision(case.desired("Pending", preflight.reason, f"preflight is waiting: {preflight.message}"))
    return Decision(case.desired("Pending", CHECKING, _CHECKING_MESSAGE))


def _after_first_attempt(case: Case) -> Decision:
    current = case.verdict
    if case.observed.orphaned_pods:
        return _wait_for_orphaned_pods(case)
    if case.own_deed and (current is None or current.state == "failed"):
        return _create(case, case.restarts, "Starting", _RESUMES[case.own_deed])
    if current and current.state == "ending" and _ends_by_own_deed(case):
        message = f"{_RESUMES[case.own_deed]}; {current.message}"
        return Decision(case.desired("Restarting", current.reason, message, open_deed(case.status, case.number)))
    if current is None:
        message = f"the Job of attempt {case.number} was deleted"
        return _restart(case, Verdict("failed", "PodDeleted", message), lifetime=0.0, ended=math.inf)
    if current.state == "failed":
        job = case.observed.current.job if case.observed.current else None
        created, finished = (job.created, job.finished_at) if job else ("", "")
        ended = seconds_between(finished, case.now) if finished else math.inf
        lifetime = seconds_between(created, case.now) - (ended if finished else 0.0)
        return _restart(case, current, lifetime=lifetime, ended=ended)
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
    phase: Phase = "Pending" if current.reason != STARTING else stopping.starting_phase(case.number)
    desired = case.desired(phase, current.reason, message)
    return Decision(desired, step.actions if step else (), requeue_after=step.wait if step else None)


def _restart(case: Case, verdict: Verdict, lifetime: float, ended: float) -> Decision:
    """Starts the next attempt, waits for its back-off, or gives up.

    `lifetime` is how long the attempt existed and `ended` is how long ago it ended, both in
    seconds; `ended` is infinite if the time isn't known, so that no back-off delays the restart.
    """
    budget = case.observed.job.spec.run_policy.max_restarts
    restart = restart_policy.next_attempt(verdict.cause, case.restarts, budget, lifetime)
    if isinstance(restart, restart_policy.GiveUp):
        if restart.budget is None:
            return Decision(stopping.failed(case, verdict, verdict.reason))
        return Decision(stopping.budget_spent(case, verdict, restart.budget))
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


def _create(case: Case, restarts: Restarts, phase: Phase, message: str, after: Verdict | None = None) -> Decision:
    """Creates the next attempt; `after` is the verdict on the failed attempt that it replaces."""
    number = case.number + 1
    failure = failure_of(after, case.number) if after else last_failure(case.observed, case.number)
    desired = DesiredStatus(phase, STARTING, message, number, restarts, failure, verdict=case.verdict)
    return Decision(desired, (CreateAttempt(number, restarts, avoided_nodes(case.observed.attempts)),))


def _wait_for_orphaned_pods(case: Case) -> Decision:
    pods = ", ".join(pod.name for pod in case.observed.orphaned_pods[:3])
    own = all(pod.owner_uid == case.observed.job.metadata.uid for pod in case.observed.orphaned_pods)
    former = "an earlier attempt" if own else "a deleted FineTuneJob of the same name"
    message = f"waiting for pods of {former} to stop: {pods}"
    return Decision(case.desired("Running" if case.number else "Pending", "PodsEnding", message))


def _ends_by_own_deed(case: Case) -> bool:
    """Whether the operator itself ends the newest attempt, not a failure that came before."""
    current = case.observed.current
    return bool(case.own_deed) and current is not None and (current.job.deleting or case.own_deed == RETRYING)


def _with_lost_nodes(case: Case, decision: Decision, lost_after: float | None) -> Decision:
    """Returns the decision that also names nodes that don't answer, and removes the Jobs of earlier
    attempts that have lost one: their pods can't be removed as long as a Job counts them. Pods that
    another container keeps hold their GPUs until then."""
    lost = tuple(
        delete(child, wait=False)
        for child in case.children
        if child.number < case.number
        and not child.job.deleting
        and any(pod.lost or pod.abandoned for pod in child.pods)
    )
    decision = replace(decision, actions=(*decision.actions, *lost))
    current, desired = case.observed.current, decision.desired
    silent = lost_nodes.silent_nodes(current) if current and current.number == case.number else ""
    if not silent or desired is None or desired.is_terminal or lost_after is None:
        return decision
    limit = case.now + timedelta(seconds=lost_after + 0.5)
    message = f"{silent}; unless that changes, the job goes on elsewhere at {limit:%H:%M:%S UTC}"
    return replace(decision, desired=replace(desired, reason=NODE_SILENT, message=message))


def _without_old_attempts(observed: Observed, decision: Decision) -> Decision:
    """Returns the decision that also deletes the Jobs of all but the two newest attempts, which are
    kept for inspection."""
    created = (action.number for action in decision.actions if isinstance(action, CreateAttempt))
    newest = max((*created, *(attempt.number for attempt in observed.attempts)), default=0)
    deleted = {action.uid for action in decision.actions if isinstance(action, DeleteJob)}
    old = tuple(
        delete(attempt, wait=False)
        for attempt in observed.attempts
        if attempt.number < newest - 1 and not attempt.job.deleting and attempt.job.uid not in deleted
    )
    return replace(decision, actions=(*decision.actions, *old))


def _requeued(decision: Decision, *delays: float | None) -> Decision:
    """Returns the decision, to be made again after the shortest of these delays, in seconds."""
    known = [seconds for seconds in (decision.requeue_after, *delays) if seconds is not None]
    return replace(decision, requeue_after=min(known, default=None))
