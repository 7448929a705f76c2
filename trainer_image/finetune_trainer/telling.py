"""Which events a person wants to find in the log, and in what words. Called by the supervisor for each of rank 0's."""

from __future__ import annotations

from finetune_api import events as e
from finetune_trainer.guards import listed
from finetune_trainer.log import Log


def tell(log: Log, event: e.Event) -> None:
    match event:
        case e.DecisionEvent():
            log.info(f"{event.topic}={event.choice} ({event.reason})")
        case e.SkippedEvent():
            one = event.first == event.step
            said = f"step {event.step} changes" if one else f"steps {event.first} to {event.step} change"
            log.warning(f"{said} nothing", reason=event.reason, rows=listed(event.rows) or None)
        case e.SpikeEvent():
            log.warning("loss spike", step=event.step, loss=event.loss, limit=event.limit, action=event.action)
        case e.BackoffEvent():
            log.warning(f"microBatchSize={event.choice} from step {event.step} on", detail=event.why)
        case _:
            return
