"""Logs those of rank 0's events that people look for, as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.messages import events as e
from finetune_api.status import OverfittingStatus
from finetune_trainer.log import Log
from finetune_trainer.reporting.run_state import RunState

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


class StepLines:
    """Logs what the steps have come to, in one line every `interval` seconds, and the first and the
    last one."""

    def __init__(self, log: Log, interval: float = 10.0) -> None:
        self._log = log
        self._interval = interval
        self._next = 0.0

    def step(self, state: RunState, now: float) -> None:
        """Logs the last step of `state` if a line is due at `now`, in seconds."""
        last = state.last
        if last is None or (now < self._next and state.step != state.total_steps):
            return
        self._next = now + self._interval
        self._log.info(step_line(state, last))


def step_line(state: RunState, last: e.StepEvent) -> str:
    """Returns a sentence about the last step, as people read it."""
    total = f" of {state.total_steps}" if state.total_steps else ""
    speed = f", {state.tokens_per_second:,.0f} tokens/s" if state.tokens_per_second else ""
    left = "" if state.eta_seconds is None else f", {duration(state.eta_seconds)} left"
    return f"step {last.step}{total}: loss {last.loss:.4f}, learning rate {last.learning_rate:.3g}{speed}{left}"


def duration(seconds: int) -> str:
    """Returns a duration in its two largest units, such as 2 h 5 min."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


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
