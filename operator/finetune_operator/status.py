"""status: what the operator says of a job, in the words of batch/v1 Job and true to kstatus; and when it is due.

Called by reconcile. Pure: the clock is an argument; whether two statuses differ is decided here, so that nothing is
written when nothing changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from finetune_api.progress import Progress
from finetune_api.result import Result
from finetune_api.status import (
    CONDITION_COMPLETE,
    CONDITION_FAILED,
    CONDITION_RECONCILING,
    CONDITION_STALLED,
    CONDITION_SUSPENDED,
    CheckpointStatus,
    Condition,
    DataStatus,
    EvaluationStatus,
    FailureStatus,
    ModelStatus,
    Status,
)
from finetune_operator import plan, policy
from finetune_operator.decision import SUSPENDED, SUSPENDING, Outlook
from finetune_operator.observe import Observed, Report
from finetune_operator.progress_status import progress

# A change that isn't urgent waits this long, so that what follows it at once costs no write of its own.
SETTLE_SECONDS = 2.0
ANSWER_SECONDS = 0.2  # the answer to a new spec comes after its pods, which under load would wait for it
WORDS_SETTLE_SECONDS = 60.0  # for other words about the same trouble: a kubelet repeats itself with other port numbers

_SHARED = EvaluationStatus.model_fields.keys() & Progress.model_fields.keys()
_URGENT_PHASES = ("Succeeded", "Failed", "Suspended")


@dataclass(frozen=True)
class _Said:
    """A condition before it has a time."""

    holds: bool
    reason: str
    message: str = ""


def status(seen: Observed, outlook: Outlook, now: datetime) -> Status:
    """The whole status after this turn."""
    before = seen.job.status
    time = timestamp(now)
    result = outlook.verdict.result if outlook.verdict else None
    reported = _reported(seen, outlook)
    return Status(
        observed_generation=seen.job.metadata.generation,
        phase=outlook.phase,
        message=outlook.message,
        conditions=_conditions(before, seen.job.metadata.generation, outlook, time),
        start_time=before.start_time or _start_time(seen, outlook, time),
        completion_time=before.completion_time or (time if outlook.is_terminal else None),
        attempt=outlook.attempt,
        gpus=plan.gpu_count(seen.job.spec),
        restarts=outlook.restarts,
        restarts_total=policy.total(outlook.restarts),
        progress=progress(seen, outlook, reported, result),
        checkpoint=None if outlook.phase == "Succeeded" else _checkpoint(seen),
        model=_model(before.model, reported, result),
        data=_data(seen, reported, result),
        artifact=(result.artifact if result else None) or before.artifact,
        evaluation=_evaluation(before.evaluation, reported, result),
        failure=None if outlook.phase == "Succeeded" else outlook.failure,
    )


def unreadable(before: Status, generation: int, message: str, now: datetime) -> Status:
    """Of a job whose spec isn't one: the API server holds another version of the schema."""
    time = timestamp(now)
    failure = FailureStatus(reason="InvalidSpec", message=message, hint=policy.hint("InvalidSpec"))
    outlook = Outlook("Failed", "InvalidSpec", message, before.attempt, before.restarts, failure)
    return before.model_copy(
        update={
            "observed_generation": generation,
            "phase": outlook.phase,
            "message": message,
            "conditions": _conditions(before, generation, outlook, time),
            "completion_time": time,
            "failure": failure,
        }
    )


def acknowledged(before: Status, generation: int) -> Status:
    """A finished job's status after a change of spec that changes nothing anymore."""
    return before.model_copy(
        update={
            "observed_generation": generation,
            "conditions": tuple(c.model_copy(update={"observed_generation": generation}) for c in before.conditions),
        }
    )


def seconds_until_due(
    before: Status, after: Status, noticed: float | None, write_every: float, now: datetime
) -> float | None:
    """How long the new status may wait; None where it says the same, 0 where it is due.

    `noticed` is how long ago, in seconds, it first differed.
    """
    if before == after:
        return None
    if _without_progress(before) == _without_progress(after):
        if before.progress is None or before.progress.update_time is None:
            return 0.0
        age = (now - datetime.fromisoformat(before.progress.update_time)).total_seconds()
        return max(0.0, write_every - age)
    if _is_urgent(before, after):
        return 0.0
    if before.observed_generation != after.observed_generation:
        return max(0.0, ANSWER_SECONDS - (noticed or 0.0))
    settle = WORDS_SETTLE_SECONDS if _without_words(before) == _without_words(after) else SETTLE_SECONDS
    return max(0.0, settle - (noticed or 0.0))


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, to the second, as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _is_urgent(before: Status, after: Status) -> bool:
    """Ends, suspensions and restarts are told at once."""
    return (
        (after.phase in _URGENT_PHASES and before.phase != after.phase)
        or before.restarts != after.restarts
        or _suspension_reason(before) != _suspension_reason(after)
    )


def _suspension_reason(of: Status) -> str:
    return next((c.reason for c in of.conditions if c.type == CONDITION_SUSPENDED), "")


def _without_progress(of: Status) -> Status:
    return of.model_copy(update={"progress": None, "checkpoint": None, "evaluation": None, "model": None, "data": None})


def _without_words(of: Status) -> Status:
    conditions = tuple(c.model_copy(update={"message": ""}) for c in of.conditions)
    return _without_progress(of).model_copy(update={"message": "", "conditions": conditions})


def _start_time(seen: Observed, outlook: Outlook, time: str) -> str | None:
    if seen.attempts:
        return seen.attempts[0].job.created
    return time if outlook.attempt > 0 else None


def _conditions(before: Status, generation: int, outlook: Outlook, time: str) -> tuple[Condition, ...]:
    failed = outlook.phase == "Failed"
    working = outlook.phase in ("Pending", "Starting", "Restarting") or outlook.suspension == SUSPENDING
    ended = "Finished" if outlook.is_terminal else "NotFinished"
    said = {
        CONDITION_COMPLETE: _Said(True, outlook.reason, outlook.message)
        if outlook.phase == "Succeeded"
        else _Said(False, ended),
        CONDITION_FAILED: _Said(True, outlook.reason, outlook.message) if failed else _Said(False, ended),
        CONDITION_SUSPENDED: _Said(outlook.suspension == SUSPENDED, outlook.suspension or "NotSuspended"),
        CONDITION_RECONCILING: _Said(True, outlook.reason, outlook.message) if working else _Said(False, outlook.phase),
        CONDITION_STALLED: _Said(True, outlook.reason, outlook.message) if failed else _Said(False, "Healthy"),
    }
    earlier = {condition.type: condition for condition in before.conditions}
    return tuple(_condition(kind, words, earlier.get(kind), generation, time) for kind, words in said.items())


def _condition(kind: str, said: _Said, before: Condition | None, generation: int, time: str) -> Condition:
    value: Literal["True", "False"] = "True" if said.holds else "False"
    unchanged = before is not None and before.status == value
    return Condition(
        type=kind,
        status=value,
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before and unchanged else time,
        reason=said.reason,
        message=said.message,
    )


def _reported(seen: Observed, outlook: Outlook) -> Report | None:
    """Progress of the attempt that status speaks of; an earlier one's is history."""
    report = seen.report
    return report if report and report.progress.attempt == outlook.attempt else None


def _checkpoint(seen: Observed) -> CheckpointStatus | None:
    """The newest that anybody told of: status, a report, or pods as they ended. A result that is complete has none."""
    reported = seen.report.progress.checkpoint if seen.report else None
    ended = (pod.result.checkpoint for attempt in seen.attempts for pod in attempt.pods if pod.result)
    return _newest(seen.job.status.checkpoint, reported, *ended)


def _newest(*checkpoints: CheckpointStatus | None) -> CheckpointStatus | None:
    known = [checkpoint for checkpoint in checkpoints if checkpoint]
    return max(known, key=lambda checkpoint: checkpoint.step) if known else None


def _model(before: ModelStatus | None, reported: Report | None, result: Result | None) -> ModelStatus | None:
    return (result.model if result else None) or (reported.progress.model if reported else None) or before


def _data(seen: Observed, reported: Report | None, result: Result | None) -> DataStatus | None:
    """Told by the preflight check first, and by the attempt's ranks again."""
    checks = (pod.result.data for pod in (seen.preflight.pods if seen.preflight else ()) if pod.result)
    told = (result.data if result else None, reported.progress.data if reported else None)
    return next((data for data in (*told, seen.job.status.data, *checks) if data), None)


def _evaluation(
    before: EvaluationStatus | None, reported: Report | None, result: Result | None
) -> EvaluationStatus | None:
    if result and result.evaluation:
        return result.evaluation.legible
    if reported is None:
        return before
    told = reported.progress
    if told.test_loss_before is None and told.eval_loss is None:
        return before
    return EvaluationStatus(**{name: getattr(told, name) for name in _SHARED}).legible
