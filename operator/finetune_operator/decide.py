"""decide: what to do next for one FineTuneJob, and what to say of it.

Called by reconcile at every turn. Pure: the clock is an argument, and nothing is remembered between two turns, so a
crash at any line changes no decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_api.status import CONDITION_SUSPENDED, TERMINAL_PHASES, FailureStatus, Phase, Restarts, Status
from finetune_operator import plan, policy
from finetune_operator.decision import (
    CHECKING,
    SUSPENDED,
    SUSPENDING,
    CreateAttempt,
    CreatePreflight,
    Decision,
    DeleteJob,
    Outlook,
)
from finetune_operator.judge import STARTING, Verdict, verdict
from finetune_operator.observe import Attempt, Observed, seconds_between


@dataclass(frozen=True)
class _Case:
    """What the branches below all need to know, once."""

    seen: Observed
    now: datetime
    number: int
    restarts: Restarts
    verdict: Verdict | None  # of attempt `number`; None where its Job is gone, or there was none yet

    @property
    def status(self) -> Status:
        return self.seen.job.status

    def outlook(self, phase: Phase, reason: str, message: str) -> Outlook:
        failure = _last_failure(self.seen, self.number)
        return Outlook(phase, reason, message, self.number, self.restarts, failure, verdict=self.verdict)


def decide(seen: Observed, now: datetime) -> Decision:
    """The next actions of a job and what its status says then."""
    if seen.job.status.phase in TERMINAL_PHASES:
        return _finished(seen, now)
    case = _case(seen, now)
    if case.verdict and case.verdict.state == "succeeded":
        return Decision(case.outlook("Succeeded", case.verdict.reason, _success(case.verdict)))
    if seen.job.spec.run_policy.suspend:
        return _suspend(case)
    left = _seconds_to_deadline(case)
    if left is not None and left <= 0:
        return _deadline(case)
    decision = _first(case) if case.number == 0 else _onward(case)
    return replace(decision, recheck=_earlier(decision.recheck, left))


def failed_to_start(seen: Observed, outlook: Outlook, reason: str, message: str) -> Outlook:
    """What is said when a child can't be created, and only a person can change that."""
    number, restarts = _standing(seen)
    failure = FailureStatus(reason=reason, message=message, attempt=number, hint=policy.hint(reason))
    return replace(
        outlook,
        phase="Failed",
        reason=reason,
        message=message,
        attempt=number,
        restarts=restarts,
        failure=failure,
        verdict=None,
    )


def blocked(seen: Observed, outlook: Outlook, message: str) -> Outlook:
    """What is said while the cluster refuses a child for now; it is tried again."""
    number, restarts = _standing(seen)
    return replace(outlook, phase="Pending", reason="Blocked", message=message, attempt=number, restarts=restarts)


def _case(seen: Observed, now: datetime) -> _Case:
    number, restarts = _standing(seen)
    current = seen.current
    found = verdict(current, dict(seen.words)) if current and current.number == number else None
    return _Case(seen, now, number, restarts, found)


def _standing(seen: Observed) -> tuple[int, Restarts]:
    """The newest attempt is the higher one of status and Jobs; its counters are on its Job, written with it."""
    current, status = seen.current, seen.job.status
    if current and current.number >= status.attempt:
        return current.number, current.job.restarts
    return status.attempt, status.restarts


def _first(case: _Case) -> Decision:
    """No attempt has been made."""
    if case.seen.strays:
        return _wait_for_strays(case)
    if not plan.wants_preflight(case.seen.job.spec):
        return _create(case, 1, case.restarts, "Starting", "pods are being created")
    check = case.seen.preflight
    if check is None:
        outlook = case.outlook("Pending", CHECKING, "checking model, data and destination")
        return Decision(outlook, (CreatePreflight(),))
    found = verdict(check, dict(case.seen.words))
    case = replace(case, verdict=found)
    if found.state == "succeeded":
        return _create(case, 1, case.restarts, "Starting", "inputs are checked; pods are being created")
    if found.state == "failed":
        return Decision(_failed(case, found, found.reason))
    stuck = found.state == "waiting" and found.reason != STARTING
    message = f"checking inputs waits: {found.message}" if stuck else "checking model, data and destination"
    return Decision(case.outlook("Pending", found.reason if stuck else CHECKING, message))


def _onward(case: _Case) -> Decision:
    """Attempt `number` was made."""
    found = case.verdict
    if case.seen.strays:
        return _wait_for_strays(case)
    if _suspended_at(case) and (found is None or found.state == "failed"):
        return _create(case, case.number + 1, case.restarts, "Starting", "goes on after suspension")
    if found is None:
        message = f"Job of attempt {case.number} was deleted"
        return _restart(case, Verdict("failed", "PodDeleted", message), lived=0.0, ended=math.inf)
    if found.state == "failed":
        job = case.seen.current.job if case.seen.current else None
        created, finished = (job.created, job.finished_at) if job else ("", "")
        ended = seconds_between(finished or created, case.now)
        return _restart(case, found, lived=seconds_between(created, case.now) - ended, ended=ended)
    if found.state == "running":
        return Decision(case.outlook("Running", "Running", found.message))
    if found.state == "ending":
        return Decision(case.outlook("Running", found.reason, found.message))
    if found.reason != STARTING:
        return Decision(case.outlook("Pending", found.reason, found.message))
    return Decision(case.outlook(_starting_phase(case.number), found.reason, found.message))


def _restart(case: _Case, found: Verdict, lived: float, ended: float) -> Decision:
    """`ended`: seconds since the attempt's end; where nobody knows it any more, it was long ago."""
    budget = case.seen.job.spec.run_policy.max_restarts
    verdict_on_budget = policy.next_attempt(found.cause, case.restarts, budget, lived)
    if isinstance(verdict_on_budget, policy.GiveUp):
        spent = verdict_on_budget.budget
        reason = "RestartBudgetSpent" if spent else found.reason
        return Decision(_failed(case, found, reason))
    case = replace(case, verdict=found)
    wait = verdict_on_budget.delay - ended
    told = f"attempt {case.number} ended: {found.reason}: {found.message}"
    if wait > 0:
        when = (case.now + timedelta(seconds=wait + 0.5)).strftime("%H:%M:%S UTC")  # rounded: the same at every turn
        outlook = case.outlook("Restarting", found.reason, f"attempt {case.number + 1} starts at {when}; {told}")
        return Decision(replace(outlook, failure=failure_of(found, case.number)), recheck=wait)
    return _create(case, case.number + 1, verdict_on_budget.restarts, "Restarting", told, found)


def _create(
    case: _Case, number: int, restarts: Restarts, phase: Phase, message: str, after: Verdict | None = None
) -> Decision:
    """The attempt before the last one is removed on the way: two are enough to look at."""
    old = tuple(_delete(a, wait=False) for a in case.seen.attempts if a.number < number - 1 and not a.job.deleting)
    failure = failure_of(after, number - 1) if after else _last_failure(case.seen, case.number)
    outlook = Outlook(phase, STARTING, message, number, restarts, failure, verdict=case.verdict)
    return Decision(outlook, (CreateAttempt(number, restarts), *old))


def _suspend(case: _Case) -> Decision:
    """Intention first, then the pods, then the word: so a crash in between costs no restart."""
    children = [*case.seen.attempts, *([case.seen.preflight] if case.seen.preflight else [])]
    live = [child for child in children if child.is_live]
    if not live and not case.seen.strays:
        outlook = case.outlook("Suspended", SUSPENDED, "spec.runPolicy.suspend is true; no pods run")
        return Decision(replace(outlook, suspension=SUSPENDED))
    if case.verdict and case.verdict.state == "failed" and case.verdict.cause == "user":
        return Decision(_failed(case, case.verdict, case.verdict.reason))
    outlook = case.outlook("Running" if case.number else "Pending", SUSPENDING, "the pods save a checkpoint and end")
    actions = tuple(_delete(child, wait=True) for child in live if not child.job.deleting)
    return Decision(replace(outlook, suspension=SUSPENDING), actions, say_first=bool(actions))


def _deadline(case: _Case) -> Decision:
    seconds = case.seen.job.spec.run_policy.active_deadline_seconds
    message = f"spec.runPolicy.activeDeadlineSeconds: {seconds} passed before it was done; raise it, or give more GPUs"
    children = [*case.seen.attempts, *([case.seen.preflight] if case.seen.preflight else [])]
    live = [child for child in children if child.is_live]
    if live or case.seen.strays:
        actions = tuple(_delete(child, wait=True) for child in live if not child.job.deleting)
        return Decision(case.outlook("Running" if case.number else "Pending", "DeadlineExceeded", message), actions)
    return Decision(_failed(case, Verdict("failed", "DeadlineExceeded", message), "DeadlineExceeded"))


def _finished(seen: Observed, now: datetime) -> Decision:
    """A finished job stays finished; after its time to live its pods go, the job stays."""
    ttl = seen.job.spec.run_policy.ttl_seconds_after_finished
    children = [*seen.attempts, *([seen.preflight] if seen.preflight else [])]
    if ttl == 0 or not children:
        return Decision(None)
    left = ttl - seconds_between(seen.job.status.completion_time or "", now)
    if left > 0:
        return Decision(None, recheck=left)
    return Decision(None, tuple(_delete(child, wait=False) for child in children if not child.job.deleting))


def _wait_for_strays(case: _Case) -> Decision:
    pods = ", ".join(pod.name for pod in case.seen.strays[:3])
    message = f"waits for pods of an earlier attempt to end: {pods}"
    return Decision(case.outlook("Running" if case.number else "Pending", "PodsEnding", message))


def _failed(case: _Case, found: Verdict, reason: str) -> Outlook:
    failure = failure_of(found, case.number)
    outlook = case.outlook("Failed", reason, found.message)
    return replace(outlook, failure=failure, verdict=found)


def failure_of(found: Verdict, attempt: int) -> FailureStatus:
    """What status.failure says of a verdict."""
    result = found.result
    return FailureStatus(
        reason=found.reason,
        message=found.message,
        attempt=attempt,
        rank=result.rank if result else None,
        exit_code=result.exit_code if result else None,
        log_tail=result.log_tail if result else "",
        hint=policy.hint(found.reason),
    )


def _last_failure(seen: Observed, number: int) -> FailureStatus | None:
    """Of the attempt before `number`: from status, or judged again where a crash kept it from being written."""
    told = seen.job.status.failure
    if told and told.attempt >= number - 1:
        return told
    for attempt in seen.attempts:
        if attempt.number == number - 1:
            found = verdict(attempt)
            return failure_of(found, attempt.number) if found.state == "failed" else told
    return told


def _suspended_at(case: _Case) -> bool:
    """Whether this attempt's pods went because of spec.runPolicy.suspend."""
    return case.status.attempt == case.number and any(
        condition.type == CONDITION_SUSPENDED and condition.reason in (SUSPENDING, SUSPENDED)
        for condition in case.status.conditions
    )


def _seconds_to_deadline(case: _Case) -> float | None:
    deadline = case.seen.job.spec.run_policy.active_deadline_seconds
    start = case.status.start_time or (case.seen.attempts[0].job.created if case.seen.attempts else "")
    return deadline - seconds_between(start, case.now) if deadline and start else None


def _delete(attempt: Attempt, wait: bool) -> DeleteJob:
    return DeleteJob(attempt.job.name, attempt.job.uid, attempt.job.resource_version, wait)


def _starting_phase(number: int) -> Phase:
    return "Starting" if number <= 1 else "Restarting"


def _success(found: Verdict) -> str:
    if found.result is None or found.result.artifact is None:
        return "trained"
    measured = found.result.evaluation.headline if found.result.evaluation else ""
    return f"the result is in {found.result.artifact.uri}{measured and f'; {measured}'}"


def _earlier(one: float | None, other: float | None) -> float | None:
    known = [seconds for seconds in (one, other) if seconds is not None]
    return min(known) if known else None
