"""Detects overfitting: the validation loss rises while the training loss falls.

The module is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.status import OverfittingStatus

EVALUATIONS = 2  # that must come after the lowest validation loss
RISE = 0.01  # of the validation loss over its lowest value, as a ratio


@dataclass(frozen=True)
class Point:
    """Holds the losses of one evaluation.

    `training` is the mean training loss of the steps since the previous evaluation.
    """

    step: int
    validation: float
    training: float


def signal(points: Sequence[Point]) -> OverfittingStatus | None:
    """Returns the status if the model overfits, else None.

    It overfits if at least two evaluations came after the lowest validation loss, the last one is
    at least 1 % above it, and the training loss has fallen since. If both losses rise, training
    itself goes wrong, which isn't overfitting.
    """
    if not points:
        return None
    best = min(points, key=lambda point: (point.validation, point.step))
    later = [point for point in points if point.step > best.step]
    if len(later) < EVALUATIONS:
        return None
    last = later[-1]
    rose = last.validation >= best.validation * (1 + RISE)
    fell = last.training < best.training
    if not rose or not fell:
        return None
    return OverfittingStatus(
        best_step=best.step,
        best_loss=round(best.validation, 4),
        step=last.step,
        loss=round(last.validation, 4),
    )
