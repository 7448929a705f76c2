"""A rank that stays slower than the others is named, and one slow step is not."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from finetune_api.messages import events
from finetune_trainer.training.steps.stragglers import Straggler, StragglerWatch, slowest
from testkit.rows import pairs
from trainer.support import rank_runs
from trainer.support.fault_injection import Fault
from trainer.support.rank_runs import prepare

EVEN = (10, 10, 10, 10)
CASES: dict[str, tuple[tuple[float, ...], tuple[int, ...], Straggler | None]] = {
    "the slowest by time per token": ((1.0, 1.0, 1.5, 1.0), EVEN, Straggler(2, 1.5)),
    "more tokens are not slower": ((1.0, 1.0, 2.0, 1.1), (10, 10, 20, 10), Straggler(3, 1.1)),
    "a rank without tokens doesn't count": ((1.0, 0.1, 1.3), (10, 0, 10), Straggler(2, 1.3)),
    "one rank has nobody to compare with": ((1.0,), (10,), None),
    "no time was measured": ((0.0, 0.0), (10, 10), None),
}


@pytest.mark.parametrize(("seconds", "tokens", "expected"), CASES.values(), ids=CASES)
def test_the_slowest_rank_of_a_step(
    seconds: tuple[float, ...], tokens: tuple[int, ...], expected: Straggler | None
) -> None:
    rank = slowest(seconds, tokens)
    assert (rank and rank.rank) == (expected and expected.rank)
    assert rank is None or expected is None or rank.ratio == pytest.approx(expected.ratio)


def changes(steps: list[tuple[float, ...]]) -> list[tuple[int, int | None]]:
    """Returns (step, the straggler from then on) for each change."""
    watch = StragglerWatch()
    reported = []
    for number, seconds in enumerate(steps, 1):
        if watch.add(seconds, EVEN):
            reported.append((number, watch.current.rank if watch.current else None))
    return reported


SLOW, OTHER, WELL = (1.0, 1.3, 1.0, 1.0), (1.0, 1.0, 1.0, 2.0), (1.0, 1.1, 1.0, 1.0)


def test_a_rank_that_stays_slow_is_reported_once_and_again_when_it_has_recovered() -> None:
    assert changes([WELL] * 5 + [SLOW] * 40 + [WELL] * 40) == [(16, 1), (61, None)]


def test_single_slow_steps_and_ranks_that_take_turns_are_no_stragglers() -> None:
    assert changes([WELL, WELL, SLOW] * 20) == []
    assert changes([SLOW, OTHER] * 20) == []
    assert changes([(1.0, 1.19, 1.0, 1.0)] * 60) == []


def test_another_rank_takes_its_place() -> None:
    assert changes([SLOW] * 20 + [OTHER] * 30) == [(11, 1), (31, 3)]


def test_a_slow_rank_is_named_with_its_node_and_changes_no_loss(tmp_path: Path, models: dict[str, Path]) -> None:
    rows, options = pairs(40), {"training": {"max_steps": 16, "micro_batch_size": 4}}
    fast = prepare(tmp_path / "fast", models["llama"], rows, world=2, **options)
    slow = prepare(tmp_path / "slow", models["llama"], rows, world=2, **options)
    (even,) = rank_runs.finish_all([fast])
    (uneven,) = rank_runs.finish_all([slow], faults={1: Fault("slow", 400)})
    assert uneven.losses == even.losses
    ranks = [step.ranks for step in uneven.events(events.StepEvent)]
    assert statistics.mode(step.slowest_rank for step in ranks if step is not None) == 1
    assert statistics.median(step.slowest - step.fastest for step in ranks if step is not None) > 0.2
    (straggler,) = uneven.events(events.StragglerEvent)
    assert (straggler.rank, straggler.node, straggler.ended) == (1, 0, False)
    assert straggler.step >= 11
    assert straggler.ratio > 1.2


def test_ranks_that_wait_for_each_other_within_a_step_are_not_compared(tmp_path: Path, models: dict[str, Path]) -> None:
    job = prepare(tmp_path / "job", models["llama"], pairs(8), world=2, strategy="fsdp", training={"max_steps": 2})
    (run,) = rank_runs.finish_all([job])
    assert [step.ranks for step in run.events(events.StepEvent)] == [None, None]
