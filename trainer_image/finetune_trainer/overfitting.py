"""Whether the model learns its rows by heart: the validation loss rises while the training loss falls. Pure; asked by
`state` after each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.status import OverfittingStatus

EVALUATIONS = 2
RISE = 0.01


@dataclass(frozen=True)
class Point:
    """One evaluation. `trained` is the mean training loss of the steps since the evaluation before."""

    step: int
    validation: float
    trained: float


def signal(points: Sequence[Point]) -> OverfittingStatus | None:
    """Set where at least two evaluations came after the lowest validation loss, the last one 1 % or more above it,
    and the training loss fell meanwhile. A rise of both is no overfitting: then training itself goes wrong."""
    if not points:
        return None
    best = min(points, key=lambda point: (point.validation, point.step))
    since = [point for point in points if point.step > best.step]
    if len(since) < EVALUATIONS:
        return None
    last = since[-1]
    rose = last.validation >= best.validation * (1 + RISE)
    fell = last.trained < best.trained
    if not rose or not fell:
        return None
    return OverfittingStatus(
        best_step=best.step,
        best_loss=round(best.validation, 4),
        step=last.step,
        loss=round(last.validation, 4),
    )
