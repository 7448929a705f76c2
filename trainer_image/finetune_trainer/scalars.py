"""What a tracker plots: an event → (step, seconds since the epoch, values by name). Pure; the same for all."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api import events


@dataclass(frozen=True)
class Point:
    """Values that belong to one optimizer step."""

    step: int
    time: float
    values: dict[str, float]


def points(event: events.Event) -> tuple[Point, ...]:
    """Nothing for what isn't plotted. What the base model reaches on the test rows stands at step 0."""
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


def _rewards(split: str, told: events.Rewards | None) -> dict[str, float]:
    """By TRL's names: rewards/chosen, logps/chosen, …"""
    if told is None:
        return {}
    values = told.model_dump()
    return {
        f"{split}/{'logps/' + name.removeprefix('logps_') if name.startswith('logps_') else 'rewards/' + name}": value
        for name, value in values.items()
    }
