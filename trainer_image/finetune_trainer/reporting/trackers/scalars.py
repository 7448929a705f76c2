"""Converts events to the points that all trackers plot. The module is pure."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.messages import events


@dataclass(frozen=True)
class Point:
    """Holds values of one optimizer step by name. `time` is in seconds since the epoch."""

    step: int
    time: float
    values: dict[str, float]


def points(event: events.Event) -> tuple[Point, ...]:
    """Returns an event's points; none if it isn't plotted.

    The base model's test scores are at step 0.
    """
    match event:
        case events.StepEvent():
            total = event.seconds.get("total", 0.0)
            values = {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/grad_norm": event.grad_norm,
                "train/epoch": event.epoch,
            }
            if total > 0:
                values["train/tokens_per_second"] = event.tokens / total
            return (Point(event.step, event.time, values | _rewards("train", event.rewards)),)
        case events.EvalEvent():
            values = {f"{event.split}/loss": event.loss} | _rewards(event.split, event.rewards)
            return (Point(event.step, event.time, values),)
        case events.SkippedEvent():
            return (Point(event.step, event.time, {"train/skipped": float(event.step - event.first + 1)}),)
        case events.ScoresEvent():
            scores = event.evaluation.scores
            return (
                Point(0, event.time, {f"test/{score.name}": score.base for score in scores}),
                Point(event.evaluation.step, event.time, {f"test/{score.name}": score.tuned for score in scores}),
            )
        case _:
            return ()


def _rewards(split: str, rewards: events.Rewards | None) -> dict[str, float]:
    """Names rewards as TRL does: rewards/chosen, logps/chosen and so on."""
    if rewards is None:
        return {}
    values = rewards.model_dump()
    return {
        f"{split}/{'logps/' + name.removeprefix('logps_') if name.startswith('logps_') else 'rewards/' + name}": value
        for name, value in values.items()
    }
