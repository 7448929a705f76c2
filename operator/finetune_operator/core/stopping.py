"""Decides how the operator itself ends attempts: by a suspension, a deadline, a change of what the
pods are made from, and how a job that has failed is tried again.

Each of them is announced in status first, then carried out, and then reported as done. In this
order a crash in between costs no restart, and no deed of the operator counts as a failure. The
clock is an argument, and there is no I/O.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_api.status import FailureStatus, Phase, Restarts
from finetune_operator.core.actions import (
    CHECKING,
    DEADLINE,
    REPLACING,
    RETRYING,
    SUSPENDED,
    SUSPENDING,
    Decision,
    DesiredStatus,
)
from finetune_operator.core.case import Case, children, delete, disk_advice, is_outdated
from finetune_operator.core.causes.failure import failure_of
from finetune_operator.core.objects import Observed, seconds_between
from finetune_operator.core.verdict import STARTING, Verdict

_SPENT = "Raise runPolicy.retry to go on from the last checkpoint with new budgets."
_UNCHECKED = "The check isn't repeated by itself any more. Raise runPolicy.retry to check again."
_MEMORY_OF_A_CHECK = (
    " Its pod has the chart's pods.preflightMemory: have that raised, or set runPolicy.preflight to never, so that the "
    "training pods check their inputs by themselves."
)
_REPLACED = "the pods are created again, because the spec or the chart has changed before they started"


def suspend(case: Case) -> Decision:
    """Stops the pods of a job whose spec says so."""
    if not case.live and not case.observed.orphaned_pods:
        message = "spec.runPolicy.suspend is true; no pods are running"
        return Decision(case.desired("Suspended", SUSPENDED, message, SUSPENDED))
    if case.verdict and case.verdict.state == "failed" and case.verdict.cause == "user":
        return Decision(failed(case, case.verdict, case.verdict.reason))
    return _stop(case, SUSPENDING, SUSPENDING, "the pods are saving a checkpoint before they stop")


def deadline_exceeded(case: Case) -> Decision:
    """Stops the pods of a job that has been active for too long, and then fails it."""
    seconds = case.observed.job.spec.run_policy.active_deadline_seconds
    message = (
        f"spec.runPolicy.activeDeadlineSeconds: the job was active for {seconds} s and didn't finish; raise it and "
        "runPolicy.retry, or use more GPUs"
    )
    if case.live or case.observed.orphaned_pods:
        return _stop(case, DEADLINE, DEADLINE, message)
    return Decision(failed(case, Verdict("failed", DEADLINE, message), DEADLINE))


def replace_outdated(case: Case) -> Decision | None:
    """Deletes pods that wait and were made from an older spec or chart; None if there are none."""
    current, check = case.observed.current, case.observed.preflight
    if case.number == 0 and check and not check.job.is_finished and is_outdated(check, case.observed):
        return Decision(case.desired("Pending", CHECKING, _REPLACED), (delete(check, wait=True),))
    is_waiting = case.verdict is not None and case.verdict.state in ("waiting", "queued")
    if current is None or not is_waiting or not is_outdated(current, case.observed):
        return None
    desired = case.desired(starting_phase(case.number), STARTING, _REPLACED, REPLACING)
    return Decision(desired, (delete(current, wait=True),), status_first=True)


def end_lost(case: Case) -> Decision | None:
    """Stops the other pods of an attempt that has lost a node, and would wait for it; None if there
    are none."""
    current = case.observed.current
    if current is None or current.job.deleting or not any(pod.lost for pod in current.pods):
        return None
    if not any(pod.is_live for pod in current.pods):
        return None
    message = "a node is lost; the other pods of the attempt are being stopped"
    return Decision(case.desired("Running", "NodeLost", message), (delete(current, wait=True),))


def finished(observed: Observed, now: datetime) -> Decision:
    """Keeps a finished job finished, unless it failed and is to be tried again.

    Its Jobs and pods are deleted after their time to live.
    """
    status, policy = observed.job.status, observed.job.spec.run_policy
    if status.phase == "Failed" and policy.retry > status.retry:
        return _retry(observed)
    remaining_children = children(observed)
    occupied = tuple(child for child in remaining_children if any(pod.abandoned for pod in child.pods))
    if any(not child.job.deleting for child in occupied):  # their pods hold GPUs for nothing
        return Decision(None, tuple(delete(child, wait=False) for child in occupied if not child.job.deleting))
    ttl = policy.ttl_seconds_after_finished
    if ttl == 0 or not remaining_children:
        return Decision(None)
    remaining = ttl - seconds_between(status.completion_time or "", now)
    if remaining > 0:
        return Decision(None, requeue_after=remaining)
    return Decision(None, tuple(delete(child, wait=False) for child in remaining_children if not child.job.deleting))


def check_failed(case: Case, verdict: Verdict) -> DesiredStatus:
    """Returns the status of a job whose preflight check has failed, and isn't tried again."""
    desired = failed(case, verdict, verdict.reason)
    if verdict.cause == "user" or desired.failure is None:
        return desired
    advice = _MEMORY_OF_A_CHECK if verdict.cause == "memory" else _advice(verdict, desired.failure)
    hint = f"{_UNCHECKED}{advice}"
    return replace(desired, failure=desired.failure.model_copy(update={"hint": hint}))


def budget_spent(case: Case, verdict: Verdict, budget: int) -> DesiredStatus:
    """Returns the status of a job that has failed as often as it may for a cause."""
    field = f"runPolicy.maxRestarts.{verdict.cause}"
    desired = failed(case, replace(verdict, message=f"{field} is {budget}; {verdict.message}"), "RestartBudgetSpent")
    if desired.failure is None:
        return desired
    hint = f"No restart is left, because {field} is {budget}. {_SPENT}{_advice(verdict, desired.failure)}"
    return replace(desired, failure=desired.failure.model_copy(update={"message": verdict.message, "hint": hint}))


def _advice(verdict: Verdict, failure: FailureStatus) -> str:
    """Returns what the reason itself advises; after an eviction, that is nothing."""
    return "" if verdict.cause == "preemption" else f" {failure.hint}"


def failed(case: Case, verdict: Verdict, reason: str) -> DesiredStatus:
    """Returns the status of a job that has failed for good."""
    if verdict.reason == "DiskFull":
        verdict = replace(verdict, message=verdict.message + disk_advice(case.observed, verdict.message))
    failure = failure_of(verdict, case.number)
    return replace(case.desired("Failed", reason, verdict.message), failure=failure, verdict=verdict)


def starting_phase(number: int) -> Phase:
    """Returns the phase of an attempt whose pods are starting."""
    return "Starting" if number <= 1 else "Restarting"


def _stop(case: Case, deed: str, reason: str, message: str) -> Decision:
    """Announces a deed of the operator, and deletes what is live."""
    desired = case.desired("Running" if case.number else "Pending", reason, message, deed)
    actions = tuple(delete(child, wait=True) for child in case.live if not child.job.deleting)
    return Decision(desired, actions, status_first=bool(actions))


def _retry(observed: Observed) -> Decision:
    """Announces that a failed job is tried again, with new restart budgets."""
    status, count = observed.job.status, observed.job.spec.run_policy.retry
    failure: FailureStatus | None = status.failure
    message = f"spec.runPolicy.retry was raised to {count}, so the job is tried again from its last checkpoint"
    phase: Phase = "Restarting" if status.attempt else "Pending"
    desired = DesiredStatus(phase, RETRYING, message, status.attempt, Restarts(), failure, suspension=RETRYING)
    return Decision(desired, status_first=True)
