"""When the course of the losses is called overfitting."""

from __future__ import annotations

import math

import pytest

from finetune_api import events
from finetune_trainer import state
from finetune_trainer.overfitting import Point, signal

_Course = list[tuple[float, float]]  # (validation, training) by evaluation


def _signal(course: _Course) -> tuple[int, int] | None:
    found = signal([Point(10 * (i + 1), validation, trained) for i, (validation, trained) in enumerate(course)])
    return (found.best_step, found.step) if found else None


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        pytest.param([], None, id="nothing yet"),
        pytest.param([(2.0, 2.0), (1.8, 1.7), (1.7, 1.5)], None, id="both fall"),
        pytest.param([(2.0, 2.0), (1.8, 1.7), (1.9, 1.2)], None, id="one worse evaluation may be chance"),
        pytest.param([(2.0, 2.0), (1.8, 1.7), (1.9, 1.2), (2.1, 0.8)], (20, 40), id="up while training falls"),
        pytest.param([(1.8, 1.7), (1.9, 1.2), (2.1, 0.8)], (10, 30), id="from the first evaluation on"),
        pytest.param([(1.8, 1.7), (1.9, 1.8), (2.1, 2.0)], None, id="both rise: training goes wrong"),
        pytest.param([(1.8, 1.7), (1.805, 1.2), (1.81, 0.8)], None, id="flat"),
        pytest.param([(1.8, 1.7), (2.0, 1.2), (2.1, 1.0), (1.7, 0.9)], None, id="it got over it"),
        pytest.param([(1.8, math.inf), (2.0, 1.2), (2.1, 1.0)], (10, 30), id="the first one came before any step"),
    ],
)
def test_overfitting(course: _Course, expected: tuple[int, int] | None) -> None:
    assert _signal(course) == expected


def test_a_resumed_run_sees_what_the_whole_run_would_see() -> None:
    """The course is folded from events; a later attempt folds it from the stored history."""
    lines: list[events.StepEvent | events.EvalEvent] = []
    for step in range(1, 41):
        lines.append(
            events.StepEvent(
                time=0, step=step, epoch=1, loss=2.0 - step / 40, learning_rate=1, grad_norm=1, tokens=1,
                label_tokens=1, samples=1, seconds={"total": 1.0},
            )
        )  # fmt: skip
        if step % 10 == 0:
            loss = 1.5 + abs(step - 20) / 50
            lines.append(events.EvalEvent(time=0, step=step, split="validation", loss=loss, label_tokens=1))
    whole = state.TrainingState()
    for line in lines:
        whole = state.after(whole, line)
    resumed = state.restored(tuple(line for line in lines if line.step <= 25), 25)
    assert resumed.overfitting is None
    for line in lines:
        if line.step > 25:
            resumed = state.after(resumed, line)
    assert whole.overfitting == resumed.overfitting
    assert whole.overfitting is not None
    assert (whole.overfitting.best_step, whole.overfitting.step) == (20, 40)
    assert whole.evaluation is not None
    assert whole.evaluation.overfitting == whole.overfitting
