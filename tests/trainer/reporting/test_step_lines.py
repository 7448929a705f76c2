"""The line by which a log shows that a model learns."""

from __future__ import annotations

import io
import json

import pytest

from finetune_api.messages import events as e
from finetune_trainer.log import Log
from finetune_trainer.reporting import run_state
from finetune_trainer.reporting.event_log import StepLines, duration


def step(number: int) -> e.StepEvent:
    return e.StepEvent(
        time=0, step=number, epoch=0.1, loss=2.71828, learning_rate=1.5e-4, grad_norm=1, tokens=5000, label_tokens=9,
        samples=4, seconds={"total": 2.0},
    )  # fmt: skip


def state_after(number: int, total: int | None = 100) -> run_state.RunState:
    state = run_state.RunState()
    if total:
        plan = e.PlanEvent(
            time=0, total_steps=total, epochs=1, rows=1, tokens_per_epoch=1, label_tokens_per_epoch=1, padding_share=0,
            parameters=1, trainable_parameters=1,
        )  # fmt: skip
        state = run_state.after(state, plan)
    return run_state.after(state, step(number))


def lines(*steps: tuple[int, float]) -> list[str]:
    """Returns what is logged for steps that end at these times."""
    stream = io.StringIO()
    step_lines = StepLines(Log(stream), interval=10.0)
    for number, now in steps:
        step_lines.step(state_after(number), now)
    return [json.loads(line)["message"] for line in stream.getvalue().splitlines()]


def test_a_line_says_how_far_and_how_fast_training_is() -> None:
    assert lines((12, 0.0)) == ["step 12 of 100: loss 2.7183, learning rate 0.00015, 2,500 tokens/s, 2 min 56 s left"]


def test_there_is_a_line_for_the_first_step_the_last_one_and_every_ten_seconds() -> None:
    steps = [(number, 5.0 + number) for number in range(1, 36)]
    numbers = [line.split()[1] for line in lines(*steps, (100, 41.0))]
    assert numbers == ["1", "11", "21", "31", "100"]


def test_slow_steps_have_a_line_each() -> None:
    assert len(lines(*((number, 60.0 * number) for number in range(1, 6)))) == 5


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7500, "2 h 5 min")])
def test_a_duration_has_two_units(seconds: int, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_without_a_plan_leaves_out_what_isnt_known() -> None:
    stream = io.StringIO()
    StepLines(Log(stream)).step(state_after(3, total=None), 0.0)
    assert json.loads(stream.getvalue())["message"] == "step 3: loss 2.7183, learning rate 0.00015, 2,500 tokens/s"
