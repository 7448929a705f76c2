"""Which events a person wants to find in the log, and in what words. Called by the supervisor for each of rank 0's."""

from __future__ import annotations

from finetune_api import events as e
from finetune_api.status import OverfittingStatus
from finetune_trainer.guards import listed
from finetune_trainer.log import Log


def tell(log: Log, event: e.Event) -> None:
    match event:
        case e.DecisionEvent():
            log.info(f"{event.topic}={event.choice} ({event.reason})")
        case e.DataEvent():
            for warning in event.data.warnings:
                log.warning(f"data: {warning}")
        case e.EvalEvent() if event.rewards is not None:
            told = event.rewards
            log.info(
                f"{event.split} after step {event.step}: loss {event.loss:.4f}, rewards/accuracies "
                f"{told.accuracies:.3f}, rewards/margins {told.margins:.4f}"
            )
        case e.SkippedEvent():
            one = event.first == event.step
            said = f"step {event.step} changes" if one else f"steps {event.first} to {event.step} change"
            log.warning(f"{said} nothing", reason=event.reason, rows=listed(event.rows) or None)
        case e.SpikeEvent():
            log.warning("loss spike", step=event.step, loss=event.loss, limit=event.limit, action=event.action)
        case e.ScoresEvent():
            for score in event.evaluation.scores:
                between = f"difference {score.low:+.4f} to {score.high:+.4f}"
                log.info(f"{score.name}: {score.base:.4f} → {score.tuned:.4f} ({between}, {score.verdict})")
        case e.BackoffEvent():
            log.warning(f"microBatchSize={event.choice} from step {event.step} on", detail=event.why)
        case _:
            return


def tell_overfitting(log: Log, before: OverfittingStatus | None, after: OverfittingStatus | None) -> None:
    """Once, when it begins."""
    if after is not None and before is None:
        log.warning(
            "overfitting: the validation loss rises while the training loss falls",
            best_step=after.best_step,
            best_loss=after.best_loss,
            step=after.step,
            loss=after.loss,
        )
