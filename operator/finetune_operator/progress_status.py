"""status.progress: what the trainer last reported, and what is left of it when the job has succeeded.

Called by `status`. Pure.
"""

from __future__ import annotations

from finetune_api.progress import Progress
from finetune_api.result import Result
from finetune_api.status import EvaluationStatus, ProgressStatus
from finetune_operator.decision import Outlook
from finetune_operator.observe import Observed, Report


def progress(seen: Observed, outlook: Outlook, reported: Report | None, result: Result | None) -> ProgressStatus | None:
    before = seen.job.status.progress
    if outlook.phase == "Succeeded":
        return _finished_progress(before, reported, result)
    if reported is None:
        return before
    told = reported.progress
    return ProgressStatus(
        step=told.step,
        total_steps=told.total_steps,
        percent=_percent(told.step, told.total_steps),
        epoch=told.epoch,
        train_loss=_rounded(told.train_loss),
        eval_loss=_rounded(told.eval_loss),
        reward_margin=_rounded(told.reward_margin),
        reward_accuracy=_rounded(told.reward_accuracy),
        eval_reward_margin=_rounded(told.eval_reward_margin),
        eval_reward_accuracy=_rounded(told.eval_reward_accuracy),
        tokens_per_second=_rounded(told.tokens_per_second, 1),
        eta_seconds=told.eta_seconds,
        skipped_steps=told.skipped_steps,
        message=told.message or told.phase,
        update_time=reported.time,
    )


def _finished_progress(
    before: ProgressStatus | None, reported: Report | None, result: Result | None
) -> ProgressStatus | None:
    """The result has the last word; what it leaves out is what was last reported."""
    told = reported.progress if reported else None
    last = before or ProgressStatus()
    step = (result.step if result else None) or (told.step if told else last.step)
    total = (result.total_steps if result else None) or (told.total_steps if told else last.total_steps)
    if not total:
        return before
    measured = (result.evaluation if result else None) or EvaluationStatus()
    said = told or Progress(attempt=0)
    return ProgressStatus(
        step=step,
        total_steps=total,
        percent=100,
        epoch=told.epoch if told else last.epoch,
        train_loss=_rounded(_first(measured.train_loss, said.train_loss, last.train_loss)),
        eval_loss=_rounded(_first(measured.eval_loss, said.eval_loss, last.eval_loss)),
        reward_margin=_rounded(_first(said.reward_margin, last.reward_margin)),
        reward_accuracy=_rounded(_first(said.reward_accuracy, last.reward_accuracy)),
        eval_reward_margin=_rounded(
            _first(measured.eval_reward_margin, said.eval_reward_margin, last.eval_reward_margin)
        ),
        eval_reward_accuracy=_rounded(
            _first(measured.eval_reward_accuracy, said.eval_reward_accuracy, last.eval_reward_accuracy)
        ),
        tokens_per_second=_rounded(told.tokens_per_second, 1) if told else last.tokens_per_second,
        eta_seconds=0,
        skipped_steps=told.skipped_steps if told else last.skipped_steps,
        message="done",
        update_time=reported.time if reported else last.update_time,
    )


def _percent(step: int, total: int) -> int:
    return min(100, 100 * step // total) if total > 0 else 0


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    """As a person reads it in `kubectl get`; the exact value is in the metrics and the history."""
    return None if value is None else round(value, digits)
