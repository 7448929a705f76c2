"""Logs those of rank 0's events that people look for, as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.messages import events as e
from finetune_api.status import OverfittingStatus
from finetune_trainer.log import Log

_LISTED = 20  # row numbers in one log line


def log_event(log: Log, event: e.Event) -> None:
    """Logs an event that people look for; ignores all others."""
    match event:
        case e.DecisionEvent(topic="experts"):  # weights that the user may believe to be trained
            log.warning(f"{event.topic}={event.choice} ({event.reason})")
        case e.DecisionEvent():
            log.info(f"{event.topic}={event.choice} ({event.reason})")
        case e.DataEvent():
            for warning in event.data.warnings:
                log.warning(f"data: {warning}")
        case e.EvalEvent() if event.rewards is not None:
            rewards = event.rewards
            log.info(
                f"{event.split} after step {event.step}: loss {event.loss:.4f}, rewards/accuracies "
                f"{rewards.accuracies:.3f}, rewards/margins {rewards.margins:.4f}"
            )
        case e.SkippedEvent():
            single = event.first == event.step
            steps = f"step {event.step} changes" if single else f"steps {event.first} to {event.step} change"
            log.warning(f"{steps} nothing", reason=event.reason, rows=listed(event.rows) or None)
        case e.SpikeEvent():
            log.warning("loss spike", step=event.step, loss=event.loss, limit=event.limit, action=event.action)
        case e.ScoresEvent():
            for score in event.evaluation.scores:
                interval = f"difference {score.low:+.4f} to {score.high:+.4f}"
                log.info(f"{score.name}: {score.base:.4f} → {score.tuned:.4f} ({interval}, {score.verdict})")
        case e.NetworkEvent() if event.warning:
            log.warning(f"network: {event.warning}")
        case e.StragglerEvent() if event.ended:
            log.info(f"rank {event.rank} is no longer slower than the others", step=event.step, node=event.node)
        case e.StragglerEvent():
            log.warning(
                f"rank {event.rank} is slower than the others", step=event.step, node=event.node, ratio=event.ratio
            )
        case e.BackoffEvent():
            log.warning(f"microBatchSize={event.choice} from step {event.step} on", detail=event.why)
        case _:
            return


def log_overfitting(log: Log, before: OverfittingStatus | None, after: OverfittingStatus | None) -> None:
    """Logs a warning when overfitting begins, and nothing while it lasts."""
    if after is not None and before is None:
        log.warning(
            "overfitting: the validation loss rises while the training loss falls",
            best_step=after.best_step,
            best_loss=after.best_loss,
            step=after.step,
            loss=after.loss,
        )


def listed(lines: Sequence[int]) -> str:
    """Returns at most 20 of the numbers as text, and how many more there are."""
    more = f" and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return ", ".join(str(line) for line in lines[:_LISTED]) + more
