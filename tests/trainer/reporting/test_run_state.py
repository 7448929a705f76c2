"""A rank's events as the supervisor reads them, and the state and history that they add up to."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_api.messages import events as e
from finetune_trainer.reporting import history, run_state
from finetune_trainer.reporting.event_reader import EventReader, last_lines


def step(number: int, tokens: int = 100, total: float = 0.5) -> e.StepEvent:
    return e.StepEvent(
        time=1.0, step=number, epoch=0.1, loss=1.0, learning_rate=0.1, grad_norm=1.0, tokens=tokens, label_tokens=1,
        samples=2, seconds={"total": total},
    )  # fmt: skip


def evaluated(number: int, split: str, loss: float) -> e.EvalEvent:
    return e.EvalEvent.model_validate({"time": 1.0, "step": number, "split": split, "loss": loss, "labelTokens": 1})


def folded(*events: e.Event) -> run_state.RunState:
    state = run_state.RunState()
    for event in events:
        state = run_state.after(state, event)
    return state


def test_speed_and_time_left_come_from_the_last_steps() -> None:
    plan = e.PlanEvent(
        time=1.0, total_steps=10, epochs=1, rows=1, tokens_per_epoch=1, label_tokens_per_epoch=1, padding_share=0,
        parameters=1, trainable_parameters=1,
    )  # fmt: skip
    state = folded(plan, *(step(i + 1) for i in range(4)))
    assert state.tokens_per_second == 200
    assert state.eta_seconds == 3
    assert folded(plan).eta_seconds is None


def test_the_reported_eval_loss_is_the_one_of_the_weights_that_were_written() -> None:
    state = folded(
        evaluated(4, "validation", 0.7), evaluated(8, "validation", 0.9), e.SavedEvent(time=1.0, path="/x", step=4)
    )
    assert state.evaluation is not None
    assert state.evaluation.eval_loss == 0.7


def test_the_first_test_loss_is_the_bases_and_the_last_the_results() -> None:
    state = folded(evaluated(0, "test", 4.0), evaluated(8, "test", 2.0))
    assert state.evaluation is not None
    assert (state.evaluation.test_loss_before, state.evaluation.test_loss_after) == (4.0, 2.0)


def test_a_restored_history_counts_tokens_but_not_this_attempts_steps() -> None:
    lines = history.parse("".join(e.encode(step(i)) + "\n" for i in range(1, 9)) + "{torn", until=6)
    state = run_state.restored(lines, 6)
    assert (state.step, state.steps_here, state.tokens, state.samples) == (6, 0, 600, 12)
    assert state.tokens_per_second is None


def test_a_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    file, line = tmp_path / "events.jsonl", e.encode(step(1))
    tail = EventReader(file)
    assert tail.read() == ()
    file.write_text(line[:20])
    assert tail.read() == ()
    with file.open("a") as more:
        more.write(line[20:] + "\nnonsense\n" + e.encode(step(2)) + "\n")
    assert [event.step for event in tail.read() if isinstance(event, e.StepEvent)] == [1, 2]
    assert tail.read() == ()


def test_the_end_of_a_log_begins_with_a_complete_line(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("".join(f"line {i}\n" for i in range(1000)))
    text = last_lines(file, 100)
    assert text.startswith("line 9")
    assert text.endswith("line 999")
    assert last_lines(tmp_path / "none") == ""


def test_a_history_is_cut_at_the_requested_step() -> None:
    recorded = history.History()
    for event in (step(1), evaluated(1, "validation", 1.0), step(2), e.PhaseEvent(time=1.0, phase="done")):
        recorded.add(event)
    assert [json.loads(line)["type"] for line in recorded.text(1).splitlines()] == ["step", "eval"]
    assert len(recorded.text().splitlines()) == 3
