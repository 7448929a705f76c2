"""Computes the status of a FineTuneJob.

Conditions follow batch/v1 Job and kstatus. The clock is an argument, and there is no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from finetune_api import untrusted as u
from finetune_api.messages.progress import Progress
from finetune_api.messages.result import Result
from finetune_api.status import (
    CONDITION_CHECKPOINTS_STORED,
    CONDITION_COMPLETE,
    CONDITION_FAILED,
    CONDITION_RECONCILING,
    CONDITION_STALLED,
    CONDITION_SUSPENDED,
    CheckpointStatus,
    Condition,
    DataStatus,
    EvaluationStatus,
    ModelStatus,
    Status,
)
from finetune_operator.core import output, plan, restart_policy
from finetune_operator.core.actions import NODE_SILENT, SUSPENDED, SUSPENDING, DesiredStatus
from finetune_operator.core.objects import Observed, Report, seconds_between
from finetune_operator.core.progress_status import progress

MAX_MESSAGE_CHARACTERS = 110
"""Of status.message, so that `kubectl get -o wide` fits a terminal; conditions have all of it."""

_COMMON_FIELDS = EvaluationStatus.model_fields.keys() & Progress.model_fields.keys()


@dataclass(frozen=True)
class _DesiredCondition:
    """Holds a condition without its times; its status is True if it holds."""

    holds: bool
    reason: str
    message: str = ""


def status(observed: Observed, desired: DesiredStatus, now: datetime) -> Status:
    """Returns the complete status that has to be written in this reconcile."""
    after = _status(observed, desired, now)
    report = _current_report(observed, desired)
    storing = report.progress.storing if report else None
    condition = output.stored_condition(observed.job.status, after, storing, timestamp(now))
    others = (c for c in after.conditions if c.type != CONDITION_CHECKPOINTS_STORED)
    return after.model_copy(update={"conditions": (*others, *condition)})


def _status(observed: Observed, desired: DesiredStatus, now: datetime) -> Status:
    before = observed.job.status
    time = timestamp(now)
    result = desired.verdict.result if desired.verdict else None
    report = _current_report(observed, desired)
    return Status(
        observed_generation=observed.job.metadata.generation,
        phase=desired.phase,
        reason=_reason(desired),
        message=u.shortened(_message(desired, report), MAX_MESSAGE_CHARACTERS),
        conditions=conditions(before, observed.job.metadata.generation, desired, time),
        start_time=before.start_time or _start_time(observed, desired, time),
        completion_time=(before.completion_time or time) if desired.is_terminal else None,
        **_pauses(before, desired, now),
        retry=before.retry if desired.phase == "Failed" else observed.job.spec.run_policy.retry,
        attempt=desired.attempt,
        gpus=plan.gpu_count(observed.job.spec) or None,
        restarts=desired.restarts,
        restarts_total=restart_policy.total(desired.restarts),
        progress=progress(observed, desired, report, result),
        checkpoint=None if desired.phase == "Succeeded" else _checkpoint(observed),
        model=_model(before.model, report, result),
        data=_data(observed, report, result),
        artifact=output.artifact(result, observed.job) or output.stored_artifact(observed, desired.attempt),
        signers=output.signers(observed),
        token_signers=output.token_signers(observed),
        evaluation=_evaluation(before.evaluation, report, result),
        failure=None if desired.phase == "Succeeded" else desired.failure,
    )


def _message(desired: DesiredStatus, report: Report | None) -> str:
    """Returns what a person should read: while all is well, what the trainer is doing."""
    if desired.phase == "Running" and desired.reason == "Running" and report:
        return report.progress.message or report.progress.phase
    return desired.message


def _reason(desired: DesiredStatus) -> str:
    """Returns the word for why a job waits, was restarted or has failed; empty if all is well."""
    if desired.phase in ("Pending", "Queued") or desired.reason == NODE_SILENT:
        return desired.reason
    return desired.failure.reason if desired.failure and desired.phase != "Succeeded" else ""


def _pauses(before: Status, desired: DesiredStatus, now: datetime) -> dict[str, Any]:
    """Returns for how long a job wasn't active, which no deadline counts."""
    since = before.paused_since or (before.completion_time if before.phase == "Failed" else None)
    if desired.phase in ("Suspended", "Queued"):
        return {"paused_since": since or timestamp(now), "paused_seconds": before.paused_seconds}
    if since is None or (desired.is_terminal and before.phase == desired.phase):
        return {"paused_since": None, "paused_seconds": before.paused_seconds}
    return {"paused_since": None, "paused_seconds": before.paused_seconds + max(0, int(seconds_between(since, now)))}


def acknowledged(before: Status, generation: int) -> Status:
    """Returns a finished job's status after a change of its spec, which has no other effect."""
    return before.model_copy(
        update={
            "observed_generation": generation,
            "conditions": tuple(c.model_copy(update={"observed_generation": generation}) for c in before.conditions),
        }
    )


def timestamp(moment: datetime) -> str:
    """Formats a time as RFC 3339 in UTC with whole seconds, as Kubernetes does."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _start_time(observed: Observed, desired: DesiredStatus, time: str) -> str | None:
    if observed.attempts:
        return observed.attempts[0].job.created or time
    return time if desired.attempt > 0 else None


def conditions(before: Status, generation: int, desired: DesiredStatus, time: str) -> tuple[Condition, ...]:
    """Returns the conditions by which a status reports what is desired.

    Whether checkpoints are stored is none of these, and stays as it is.
    """
    failed = desired.phase == "Failed"
    working = desired.phase in ("Pending", "Queued", "Starting", "Restarting") or desired.suspension == SUSPENDING
    working = working and not desired.stalled
    met = _DesiredCondition(True, desired.reason, desired.message)
    not_met = _DesiredCondition(False, "Finished" if desired.is_terminal else "NotFinished")
    is_suspended = desired.suspension == SUSPENDED
    idle = _DesiredCondition(False, desired.phase, "" if desired.is_terminal else desired.message)
    if desired.reason == NODE_SILENT:
        idle = replace(idle, reason=NODE_SILENT)
    by_type = {
        CONDITION_COMPLETE: met if desired.phase == "Succeeded" else not_met,
        CONDITION_FAILED: met if failed else not_met,
        CONDITION_SUSPENDED: _DesiredCondition(
            is_suspended, desired.suspension or "NotSuspended", desired.message if is_suspended else ""
        ),
        CONDITION_RECONCILING: met if working else idle,
        CONDITION_STALLED: met if failed or desired.stalled else _DesiredCondition(False, "Healthy"),
    }
    earlier = {condition.type: condition for condition in before.conditions}
    stored = (earlier[kind] for kind in (CONDITION_CHECKPOINTS_STORED,) if kind in earlier)
    return (
        *(_condition(kind, condition, earlier.get(kind), generation, time) for kind, condition in by_type.items()),
        *stored,
    )


def _condition(
    kind: str, desired: _DesiredCondition, before: Condition | None, generation: int, time: str
) -> Condition:
    value: Literal["True", "False"] = "True" if desired.holds else "False"
    unchanged = before is not None and before.status == value
    return Condition(
        type=kind,
        status=value,
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before and unchanged else time,
        reason=desired.reason,
        message=desired.message,
    )


def _current_report(observed: Observed, desired: DesiredStatus) -> Report | None:
    """Returns the report of the current attempt; that of an earlier attempt is obsolete."""
    report = observed.report
    return report if report and report.progress.attempt == desired.attempt else None


def _checkpoint(observed: Observed) -> CheckpointStatus | None:
    """Returns the newest checkpoint that status, the report or a terminated pod mentions."""
    reported = observed.report.progress.checkpoint if observed.report else None
    ended = (pod.result.checkpoint for attempt in observed.attempts for pod in attempt.pods if pod.result)
    credible = (checkpoint for checkpoint in (reported, *ended) if output.contains(observed.job, checkpoint))
    return _newest(observed.job.status.checkpoint, *credible)


def _newest(*checkpoints: CheckpointStatus | None) -> CheckpointStatus | None:
    existing = [checkpoint for checkpoint in checkpoints if checkpoint]
    return max(existing, key=lambda checkpoint: checkpoint.step) if existing else None


def _model(before: ModelStatus | None, report: Report | None, result: Result | None) -> ModelStatus | None:
    return (result.model if result else None) or (report.progress.model if report else None) or before


def _data(observed: Observed, report: Report | None, result: Result | None) -> DataStatus | None:
    """Returns the ranks' figures if they exist, else the older ones of the preflight check."""
    checks = (pod.result.data for pod in (observed.preflight.pods if observed.preflight else ()) if pod.result)
    current = (result.data if result else None, report.progress.data if report else None)
    return next((data for data in (*current, observed.job.status.data, *checks) if data), None)


def _evaluation(
    before: EvaluationStatus | None, report: Report | None, result: Result | None
) -> EvaluationStatus | None:
    if result and result.evaluation:
        return result.evaluation.rounded
    if report is None:
        return before
    current = report.progress
    if current.test_loss_before is None and current.eval_loss is None:
        return before
    return EvaluationStatus(**{name: getattr(current, name) for name in _COMMON_FIELDS}).rounded
