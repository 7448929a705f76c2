"""The plan's promises hold for any lengths, batch and world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer import layout, plan, prefixes, selection
from finetune_trainer.selection import Best

_Examples = list[tuple[int, int]]  # tokens, and how many of them are learnt: never the first
_example = st.integers(2, 64).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens - 1)))
_examples = st.lists(_example, min_size=1, max_size=40)
_shapes = st.builds(
    plan.Shape, world=st.integers(1, 5), rows=st.integers(1, 4), tokens=st.integers(64, 256), packed=st.booleans()
)


def _plan(
    examples: _Examples, shape: plan.Shape, batch: int, *, by_length: bool = False, **until: float | int | None
) -> plan.Plan:
    lengths, labels = np.array(examples).T
    return plan.make(
        seed=3,
        lengths=lengths,
        label_counts=labels,
        global_batch=batch,
        epochs=until.get("epochs"),
        max_steps=until.get("max_steps"),  # type: ignore[arg-type]
        shape=shape,
        by_length=by_length,
    )


def _all_but_one_learnt(lengths: Iterable[int]) -> _Examples:
    return [(length, length - 1) for length in lengths]


@given(_examples, _shapes, st.integers(1, 17), st.integers(1, 3), st.booleans())
def test_every_row_comes_once_an_epoch(
    examples: _Examples, shape: plan.Shape, batch: int, epochs: int, by_length: bool
) -> None:
    p = _plan(examples, shape, batch, epochs=float(epochs), by_length=by_length)
    seen = [example for number in range(1, p.total_steps + 1) for example in p.step(number).examples]
    for epoch in range(epochs):
        part = seen[epoch * len(examples) : (epoch + 1) * len(examples)]
        assert sorted(part) == list(range(len(examples)))
    assert len(seen) == epochs * len(examples)
    assert p.step(p.total_steps).epoch == epochs


@given(_examples, _shapes, st.integers(1, 17))
def test_micro_batches_hold_each_example_once_and_fit_and_are_as_many_on_every_rank(
    examples: _Examples, shape: plan.Shape, batch: int
) -> None:
    step = _plan(examples, shape, batch, max_steps=2).step(1)
    assert len(step.micros) == shape.world
    assert len({len(rank) for rank in step.micros}) == 1
    micros = [micro for rank in step.micros for micro in rank]
    assert Counter(e for micro in micros for e in micro) == Counter(step.examples)
    for micro in micros:
        if shape.packed:
            assert sum(examples[e][0] for e in micro) <= shape.tokens
        else:
            assert len(micro) <= shape.rows


@given(_examples, _shapes, _shapes, st.integers(1, 17), st.integers(1, 9), st.booleans())
def test_neither_world_nor_packing_changes_what_a_step_learns(
    examples: _Examples, one: plan.Shape, other: plan.Shape, batch: int, number: int, by_length: bool
) -> None:
    a, b = (_plan(examples, shape, batch, max_steps=9, by_length=by_length).step(number) for shape in (one, other))
    assert (a.examples, a.tokens, a.label_tokens, a.epoch) == (b.examples, b.tokens, b.label_tokens, b.epoch)


@given(_examples, _shapes, st.integers(1, 17), st.booleans(), st.data())
def test_a_step_is_the_same_whichever_were_asked_for_before(
    examples: _Examples, shape: plan.Shape, batch: int, by_length: bool, data: st.DataObject
) -> None:
    """Resuming is asking for the next step."""
    fresh, used = (_plan(examples, shape, batch, max_steps=12, by_length=by_length) for _ in range(2))
    for number in data.draw(st.lists(st.integers(1, 12), max_size=5)):
        used.step(number)
    number = data.draw(st.integers(1, 12))
    assert fresh.step(number) == used.step(number)


@given(_examples, _shapes, st.integers(1, 17))
def test_the_denominator_is_the_sum_of_the_labels(examples: _Examples, shape: plan.Shape, batch: int) -> None:
    step = _plan(examples, shape, batch, max_steps=1).step(1)
    assert step.label_tokens == sum(examples[e][1] for e in step.examples)
    assert step.tokens == sum(examples[e][0] for e in step.examples)


@settings(max_examples=50)
@given(st.lists(st.integers(2, 64), min_size=16, max_size=64), st.integers(1, 4))
def test_packed_ranks_are_in_balance(lengths: list[int], world: int) -> None:
    """No rank computes more than the mean and one longest example."""
    shape = plan.Shape(world=world, rows=1, tokens=256, packed=True)
    step = _plan(_all_but_one_learnt(lengths), shape, len(lengths), max_steps=1).step(1)
    loads = [sum(lengths[e] for micro in rank for e in micro) for rank in step.micros]
    assert max(loads) <= sum(loads) / world + len(step.micros[0]) * max(lengths)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 20, 40]), st.lists(st.integers(0, 1), min_size=2, max_size=60)),
        min_size=1,
        max_size=24,
    ),
    st.integers(1, 4),
    st.integers(16, 90),
)
def test_rows_with_shared_beginnings_come_once_and_fit_and_are_as_many_on_every_rank(
    given_rows: list[tuple[int, list[int]]], world: int, budget: int
) -> None:
    """A micro-batch computes what its row is long, at most the budget or, where that is more, the longest example."""
    rows = [[2] * head + rest for head, rest in given_rows]
    lengths = np.array([len(row) for row in rows])
    ids = np.array([token for row in rows for token in row], np.int32)
    found = prefixes.Prefixes(*prefixes.find(ids, np.concatenate([[0], np.cumsum(lengths)])))
    shape = plan.Shape(world, 1, budget, True, True)
    ranks = plan.cut(range(len(rows)), lengths, shape, found)
    assert len({len(rank) for rank in ranks}) == 1
    micros = [micro for rank in ranks for micro in rank]
    assert sorted(e for micro in micros for e in micro) == list(range(len(rows)))
    for micro in filter(None, micros):
        work = plan.positions(micro, lengths, shape, found)
        row = layout.lay([len(rows[e]) for e in micro], found.shared(micro, lengths))
        assert layout.filled(work) == row.layout.size
        assert work <= max(budget, max(len(row) for row in rows))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_a_last_batch_that_is_filled_up_with_rows_again(world: int, packed: bool) -> None:
    """Bug 25: 1 to 9 rows on 1 to 3 ranks, each row once an epoch, in the micro-batches too."""
    for rows in range(1, 10):
        p = _plan(_all_but_one_learnt(range(5, 5 + rows)), plan.Shape(world, 2, 64, packed), 4, epochs=2.0)
        steps = [p.step(number) for number in range(1, p.total_steps + 1)]
        seen = Counter(e for step in steps for rank in step.micros for micro in rank for e in micro)
        assert seen == dict.fromkeys(range(rows), 2)


def test_packing_computes_no_padding_but_what_fills_a_row_up() -> None:
    shape = plan.Shape(world=2, rows=1, tokens=128, packed=True)
    packed = _plan(_all_but_one_learnt([5, 9, 33, 60, 2, 17]), shape, 6, max_steps=4)
    assert packed.padding_share() == pytest.approx(1 - 126 / 128)  # two rows of 63
    assert packed.computed_share() == 1.0


@pytest.mark.parametrize(
    ("until", "steps", "epochs"),
    [({"epochs": 2.0}, 5, 2.0), ({"epochs": 0.5}, 2, 0.5), ({"max_steps": 7}, 7, 2.8), ({}, 8, 3.0)],
)
def test_the_steps_are_known_before_the_start(until: dict[str, float], steps: int, epochs: float) -> None:
    p = _plan(_all_but_one_learnt([4] * 10), plan.Shape(1, 1, 64, True), 4, **until)
    assert (p.total_steps, p.epochs) == (steps, epochs)


def test_epochs_have_different_orders_and_seeds_too() -> None:
    orders = [tuple(plan.order(seed, epoch, 50)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_grouped_by_length_a_run_begins_with_its_longest_step_and_pads_little() -> None:
    lengths = [2 + (index * 37) % 199 for index in range(1000)]
    shape = plan.Shape(world=1, rows=4, tokens=0, packed=False)
    grouped, random = (
        _plan(_all_but_one_learnt(lengths), shape, 8, epochs=2.0, by_length=by_length) for by_length in (True, False)
    )
    assert max(lengths[e] for e in grouped.step(1).examples) == max(lengths)
    assert grouped.padding_share() < 0.06
    assert random.padding_share() > 0.2
    spreads = [int(np.ptp([lengths[e] for e in grouped.step(n).examples])) for n in range(1, grouped.total_steps + 1)]
    assert sorted(spreads)[-1] < 199 / 4
    means = [float(np.mean([lengths[e] for e in grouped.step(n).examples])) for n in range(2, 126)]
    assert abs(float(np.corrcoef(means[:-1], means[1:])[0, 1])) < 0.25  # the steps themselves come in no order
    assert grouped.step(1) != grouped.step(126)


def test_the_best_evaluation_is_the_first_of_the_lowest_and_patience_counts_the_rest() -> None:
    best: Best | None = None
    verdicts = []
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0, 4.0], start=1):
        best = selection.after_eval(best, step, loss)
        verdicts.append(selection.should_stop(best, 2))
    assert best == Best(5, 1.0, 1)
    assert verdicts == [False, False, False, True, False, False]
    assert not selection.should_stop(Best(1, 1.0, 99), None)


def test_checkpoints_and_evaluations_come_at_their_steps_and_at_the_end() -> None:
    assert [s for s in range(1, 11) if selection.is_eval_step(s, 10, 4)] == [4, 8, 10]
    assert [s for s in range(1, 11) if selection.is_eval_step(s, 10, 0)] == [10]


@pytest.mark.parametrize(
    ("every", "exact", "stalled", "since", "expected"),
    [
        pytest.param(3, False, 99.0, 9999.0, [3, 6, 9, 12, 15, 18, 20], id="as asked, whatever it costs"),
        pytest.param("auto", False, 3.0, 5.0, list(range(2, 21, 2)), id="auto is a tenth"),
        pytest.param("auto", False, 3.1, 5.0, [20], id="auto leaves out what costs more than 3 %"),
        pytest.param("auto", False, 3.1, 600.0, list(range(1, 21)), id="auto never waits longer than 10 minutes"),
        pytest.param("auto", True, 99.0, 9999.0, list(range(2, 21, 2)), id="a rollback's steps depend on no clock"),
    ],
)
def test_checkpoints_come_when_they_are_worth_it(
    every: int | str, exact: bool, stalled: float, since: float, expected: list[int]
) -> None:
    when, _ = selection.cadence(every, 20, exact=exact)
    due = [
        step
        for step in range(1, 21)
        if selection.is_checkpoint_step(when, step, 20, since=since, stalled=stalled, elapsed=100.0)
    ]
    assert due == expected


def test_a_micro_batch_is_told_in_the_users_unit() -> None:
    assert str(plan.shape(2, "auto", 1024, True, 100)) == "up to 1024 tokens"
    assert str(plan.shape(2, "auto", 1024, False, 100)) == "up to 10 examples"
    assert plan.shape(2, 4, 4 * 128, False, 100).rows == 4
