"""Computes status.progress from the trainer's last report and, after success, from the result.

It reads no clock and does no I/O.
"""

from __future__ import annotations

from finetune_api.messages.progress import Progress
from finetune_api.messages.result import Result
from finetune_api.status import EvaluationStatus, ProgressStatus
from finetune_operator.core.actions import DesiredStatus
from finetune_operator.core.objects import Observed, Report


def progress(
    observed: Observed, desired: DesiredStatus, report: Report | None, result: Result | None
) -> ProgressStatus | None:
    """Returns status.progress; `report` is the newest one of the current attempt, or None."""
    before = observed.job.status.progress
    if desired.phase == "Succeeded":
        return _final_progress(before, report, result, desired.attempt)
    if report is None:
        return before
    current = report.progress
    return ProgressStatus(
        attempt=current.attempt,
        phase=current.phase,
        step=current.step,
        total_steps=current.total_steps,
        percent=_percent(current.step, current.total_steps),
        epoch=current.epoch,
        train_loss=_rounded(current.train_loss),
        eval_loss=_rounded(current.eval_loss),
        reward_margin=_rounded(current.reward_margin),
        reward_accuracy=_rounded(current.reward_accuracy),
        eval_reward_margin=_rounded(current.eval_reward_margin),
        eval_reward_accuracy=_rounded(current.eval_reward_accuracy),
        tokens_per_second=_rounded(current.tokens_per_second, 1),
        eta_seconds=current.eta_seconds,
        eta=duration(current.eta_seconds) if current.eta_seconds else "",
        skipped_steps=current.skipped_steps,
        straggler=current.straggler,
        message=current.message or current.phase,
        update_time=report.time,
    )


def _final_progress(
    before: ProgressStatus | None, report: Report | None, result: Result | None, attempt: int
) -> ProgressStatus | None:
    """Returns the progress of a finished job, whose last attempt is `attempt`.

    It prefers the result's figures; missing ones come from the last report, then from status.
    """
    last_report = report.progress if report else None
    last = before or ProgressStatus()
    step = (result.step if result else None) or (last_report.step if last_report else last.step)
    total = (result.total_steps if result else None) or (last_report.total_steps if last_report else last.total_steps)
    if not total:
        return before
    evaluation = (result.evaluation if result else None) or EvaluationStatus()
    current = last_report or Progress(attempt=0)
    return ProgressStatus(
        attempt=attempt,
        phase="done",
        step=step,
        total_steps=total,
        percent=100,
        epoch=last_report.epoch if last_report else last.epoch,
        train_loss=_rounded(_first(evaluation.train_loss, current.train_loss, last.train_loss)),
        eval_loss=_rounded(_first(evaluation.eval_loss, current.eval_loss, last.eval_loss)),
        reward_margin=_rounded(_first(current.reward_margin, last.reward_margin)),
        reward_accuracy=_rounded(_first(current.reward_accuracy, last.reward_accuracy)),
        eval_reward_margin=_rounded(
            _first(evaluation.eval_reward_margin, current.eval_reward_margin, last.eval_reward_margin)
        ),
        eval_reward_accuracy=_rounded(
            _first(evaluation.eval_reward_accuracy, current.eval_reward_accuracy, last.eval_reward_accuracy)
        ),
        tokens_per_second=_rounded(last_report.tokens_per_second, 1) if last_report else last.tokens_per_second,
        eta_seconds=0,
        skipped_steps=last_report.skipped_steps if last_report else last.skipped_steps,
        message="done",
        update_time=report.time if report else last.update_time,
    )


def duration(seconds: int) -> str:
    """Returns a duration as kubectl shows ages: in its two largest units, or in one if the other
    hardly matters."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    return f"{days}d{hours % 24}h" if days < 8 and hours % 24 else f"{days}d"


def _percent(step: int, total: int) -> int:
    return min(100, 100 * step // total) if total > 0 else 0


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    """Rounds a figure for people; metrics and the history have the exact value."""
    return None if value is None else round(value, digits)
