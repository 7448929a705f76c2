"""When a run's losses count as overfitting."""

from __future__ import annotations

import math

import pytest

from finetune_api.messages import events
from finetune_trainer.reporting import run_state
from finetune_trainer.reporting.overfitting import Point, signal

_Course = list[tuple[float, float]]  # (validation, training) by evaluation


def _signal(course: _Course) -> tuple[int, int] | None:
    overfitting = signal([Point(10 * (i + 1), validation, trained) for i, (validation, trained) in enumerate(course)])
    return (overfitting.best_step, overfitting.step) if overfitting else None


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


def test_a_resumed_run_reports_what_an_uninterrupted_run_would_report() -> None:
    """The losses are accumulated from events; a later attempt accumulates them from the stored
    history."""
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
    uninterrupted = run_state.RunState()
    for line in lines:
        uninterrupted = run_state.after(uninterrupted, line)
    resumed = run_state.restored(tuple(line for line in lines if line.step <= 25), 25)
    assert resumed.overfitting is None
    for line in lines:
        if line.step > 25:
            resumed = run_state.after(resumed, line)
    assert uninterrupted.overfitting == resumed.overfitting
    assert uninterrupted.overfitting is not None
    assert (uninterrupted.overfitting.best_step, uninterrupted.overfitting.step) == (20, 40)
    assert uninterrupted.evaluation is not None
    assert uninterrupted.evaluation.overfitting == uninterrupted.overfitting
