"""The batch plan's guarantees hold for any lengths, batch size and world size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.checkpoint import cadence
from finetune_trainer.checkpoint.state import Best
from finetune_trainer.data import shared_prefixes
from finetune_trainer.data.batching import batch_plan, packed_layout
from finetune_trainer.training import early_stopping

_Examples = list[tuple[int, int]]  # tokens, and how many of them are labels: never the first
_example = st.integers(2, 64).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens - 1)))
_examples = st.lists(_example, min_size=1, max_size=40)
_shapes = st.builds(
    batch_plan.MicroBatchShape,
    world=st.integers(1, 5),
    rows=st.integers(1, 4),
    tokens=st.integers(64, 256),
    packed=st.booleans(),
)


def _plan(
    examples: _Examples,
    shape: batch_plan.MicroBatchShape,
    batch: int,
    *,
    by_length: bool = False,
    **until: float | int | None,
) -> batch_plan.BatchPlan:
    lengths, labels = np.array(examples).T
    options = batch_plan.PlanOptions(
        seed=3,
        global_batch=batch,
        epochs=until.get("epochs"),
        max_steps=until.get("max_steps"),  # type: ignore[arg-type]
        by_length=by_length,
    )
    return batch_plan.make(options, lengths, labels, shape)


def _all_labeled(lengths: Iterable[int]) -> _Examples:
    return [(length, length - 1) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "rows", "tokens", "smallest"),
    [
        ((10, 10, 10, 10), 2, 0, False),
        ((10, 10, 10, 10), 1, 0, True),
        ((10, 10, 10, 10), 0, 20, False),
        ((10, 10, 10, 10), 0, 19, True),
        ((40, 10, 10, 10), 0, 70, False),
        ((40, 10, 10, 10), 0, 30, True),
        ((40,), 4, 0, True),
    ],
    ids=[
        "two padded", "one padded", "two in a packed row", "one in each packed row", "all in a packed row",
        "the longest example is alone, and more than a shorter row", "one example",
    ],
)  # fmt: skip
def test_a_plan_is_the_smallest_if_its_largest_micro_batch_is_one_example(
    lengths: tuple[int, ...], rows: int, tokens: int, smallest: bool
) -> None:
    shape = batch_plan.MicroBatchShape(world=1, rows=max(1, rows), tokens=max(1, tokens), packed=rows == 0)
    assert _plan(_all_labeled(lengths), shape, 4, epochs=1.0).is_smallest is smallest


@given(_examples, _shapes, st.integers(1, 17), st.booleans())
def test_halving_always_ends_at_a_smallest_plan(
    examples: _Examples, shape: batch_plan.MicroBatchShape, batch: int, by_length: bool
) -> None:
    plan = _plan(examples, shape, batch, epochs=1.0, by_length=by_length)
    assert plan.halved(16).is_smallest


@given(_examples, _shapes, st.integers(1, 17), st.integers(1, 3), st.booleans())
def test_every_row_occurs_once_per_epoch(
    examples: _Examples, shape: batch_plan.MicroBatchShape, batch: int, epochs: int, by_length: bool
) -> None:
    plan = _plan(examples, shape, batch, epochs=float(epochs), by_length=by_length)
    examples_in_order = [example for number in range(1, plan.total_steps + 1) for example in plan.step(number).examples]
    for epoch in range(epochs):
        part = examples_in_order[epoch * len(examples) : (epoch + 1) * len(examples)]
        assert sorted(part) == list(range(len(examples)))
    assert len(examples_in_order) == epochs * len(examples)
    assert plan.step(plan.total_steps).epoch == epochs


@given(_examples, _shapes, st.integers(1, 17))
def test_micro_batches_contain_each_example_once_and_fit_and_every_rank_has_as_many(
    examples: _Examples, shape: batch_plan.MicroBatchShape, batch: int
) -> None:
    step = _plan(examples, shape, batch, max_steps=2).step(1)
    assert len(step.micro_batches) == shape.world
    assert len({len(rank) for rank in step.micro_batches}) == 1
    micro_batches = [micro_batch for rank in step.micro_batches for micro_batch in rank]
    assert Counter(e for micro_batch in micro_batches for e in micro_batch) == Counter(step.examples)
    for micro_batch in micro_batches:
        if shape.packed:
            assert sum(examples[e][0] for e in micro_batch) <= shape.tokens
        else:
            assert len(micro_batch) <= shape.rows


@given(_examples, _shapes, _shapes, st.integers(1, 17), st.integers(1, 9), st.booleans())
def test_neither_world_nor_packing_changes_what_a_step_trains_on(
    examples: _Examples,
    one: batch_plan.MicroBatchShape,
    other: batch_plan.MicroBatchShape,
    batch: int,
    number: int,
    by_length: bool,
) -> None:
    a, b = (_plan(examples, shape, batch, max_steps=9, by_length=by_length).step(number) for shape in (one, other))
    assert (a.examples, a.tokens, a.label_tokens, a.epoch) == (b.examples, b.tokens, b.label_tokens, b.epoch)


@given(_examples, _shapes, st.integers(1, 17), st.booleans(), st.data())
def test_a_step_is_the_same_whichever_steps_were_computed_before(
    examples: _Examples, shape: batch_plan.MicroBatchShape, batch: int, by_length: bool, data: st.DataObject
) -> None:
    """A resumed run only computes the plan's next step."""
    fresh, used = (_plan(examples, shape, batch, max_steps=12, by_length=by_length) for _ in range(2))
    for number in data.draw(st.lists(st.integers(1, 12), max_size=5)):
        used.step(number)
    number = data.draw(st.integers(1, 12))
    assert fresh.step(number) == used.step(number)


@given(_examples, _shapes, st.integers(1, 17))
def test_the_denominator_is_the_sum_of_the_labels(
    examples: _Examples, shape: batch_plan.MicroBatchShape, batch: int
) -> None:
    step = _plan(examples, shape, batch, max_steps=1).step(1)
    assert step.label_tokens == sum(examples[e][1] for e in step.examples)
    assert step.tokens == sum(examples[e][0] for e in step.examples)


@settings(max_examples=50)
@given(st.lists(st.integers(2, 64), min_size=16, max_size=64), st.integers(1, 4))
def test_packed_ranks_are_balanced(lengths: list[int], world: int) -> None:
    """The largest load of a rank is at most the mean plus the longest example for each
    micro-batch."""
    shape = batch_plan.MicroBatchShape(world=world, rows=1, tokens=256, packed=True)
    step = _plan(_all_labeled(lengths), shape, len(lengths), max_steps=1).step(1)
    loads = [sum(lengths[e] for micro in rank for e in micro) for rank in step.micro_batches]
    assert max(loads) <= sum(loads) / world + len(step.micro_batches[0]) * max(lengths)


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
def test_rows_with_shared_prefixes_occur_once_and_fit_and_every_rank_has_as_many_micro_batches(
    drawn_rows: list[tuple[int, list[int]]], world: int, budget: int
) -> None:
    """A micro-batch computes as many positions as its row has: at most the budget, or the longest
    example if that is longer."""
    rows = [[2] * head + rest for head, rest in drawn_rows]
    lengths = np.array([len(row) for row in rows])
    ids = np.array([token for row in rows for token in row], np.int32)
    prefixes = shared_prefixes.SharedPrefixes(*shared_prefixes.find(ids, np.concatenate([[0], np.cumsum(lengths)])))
    shape = batch_plan.MicroBatchShape(world, 1, budget, True, True)
    ranks = batch_plan.split_into_micro_batches(range(len(rows)), lengths, shape, prefixes)
    assert len({len(rank) for rank in ranks}) == 1
    micro_batches = [micro_batch for rank in ranks for micro_batch in rank]
    assert sorted(e for micro_batch in micro_batches for e in micro_batch) == list(range(len(rows)))
    for micro_batch in filter(None, micro_batches):
        computed = batch_plan.positions(micro_batch, lengths, shape, prefixes)
        row = packed_layout.pack([len(rows[e]) for e in micro_batch], prefixes.shared(micro_batch, lengths))
        assert packed_layout.rounded_up(computed) == row.layout.size
        assert computed <= max(budget, max(len(row) for row in rows))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_a_last_batch_that_is_filled_up_with_rows_again(world: int, packed: bool) -> None:
    """Bug 25: 1 to 9 rows on 1 to 3 ranks; each row occurs once per epoch, in the micro-batches
    too."""
    for rows in range(1, 10):
        plan = _plan(_all_labeled(range(5, 5 + rows)), batch_plan.MicroBatchShape(world, 2, 64, packed), 4, epochs=2.0)
        steps = [plan.step(number) for number in range(1, plan.total_steps + 1)]
        counts = Counter(
            e for step in steps for rank in step.micro_batches for micro_batch in rank for e in micro_batch
        )
        assert counts == dict.fromkeys(range(rows), 2)


def test_packing_computes_no_padding_except_what_fills_a_row() -> None:
    shape = batch_plan.MicroBatchShape(world=2, rows=1, tokens=128, packed=True)
    packed = _plan(_all_labeled([5, 9, 33, 60, 2, 17]), shape, 6, max_steps=4)
    assert packed.padding_share() == pytest.approx(1 - 126 / 128)  # two rows of 63
    assert packed.computed_share() == 1.0


@pytest.mark.parametrize(
    ("until", "steps", "epochs"),
    [({"epochs": 2.0}, 5, 2.0), ({"epochs": 0.5}, 2, 0.5), ({"max_steps": 7}, 7, 2.8), ({}, 8, 3.0)],
)
def test_the_steps_are_known_before_the_start(until: dict[str, float], steps: int, epochs: float) -> None:
    plan = _plan(_all_labeled([4] * 10), batch_plan.MicroBatchShape(1, 1, 64, True), 4, **until)
    assert (plan.total_steps, plan.epochs) == (steps, epochs)


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = [tuple(batch_plan.order(seed, epoch, 50)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_a_run_grouped_by_length_begins_with_its_longest_step_and_pads_little() -> None:
    lengths = [2 + (index * 37) % 199 for index in range(1000)]
    shape = batch_plan.MicroBatchShape(world=1, rows=4, tokens=0, packed=False)
    grouped, random = (
        _plan(_all_labeled(lengths), shape, 8, epochs=2.0, by_length=by_length) for by_length in (True, False)
    )
    assert max(lengths[e] for e in grouped.step(1).examples) == max(lengths)
    assert grouped.padding_share() < 0.06
    assert random.padding_share() > 0.2
    spreads = [int(np.ptp([lengths[e] for e in grouped.step(n).examples])) for n in range(1, grouped.total_steps + 1)]
    assert sorted(spreads)[-1] < 199 / 4
    means = [float(np.mean([lengths[e] for e in grouped.step(n).examples])) for n in range(2, 126)]
    assert abs(float(np.corrcoef(means[:-1], means[1:])[0, 1])) < 0.25  # the steps themselves have no order
    assert grouped.step(1) != grouped.step(126)


def test_the_best_evaluation_is_the_first_of_the_lowest_and_patience_counts_the_rest() -> None:
    best: Best | None = None
    verdicts = []
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0, 4.0], start=1):
        best = early_stopping.after_eval(best, step, loss)
        verdicts.append(early_stopping.should_stop(best, 2))
    assert best == Best(5, 1.0, 1)
    assert verdicts == [False, False, False, True, False, False]
    assert not early_stopping.should_stop(Best(1, 1.0, 99), None)


def test_evaluations_run_at_their_steps_and_at_the_end() -> None:
    assert [s for s in range(1, 11) if early_stopping.is_eval_step(s, 10, 4)] == [4, 8, 10]
    assert [s for s in range(1, 11) if early_stopping.is_eval_step(s, 10, 0)] == [10]


@pytest.mark.parametrize(
    ("every", "exact", "stalled", "since", "expected"),
    [
        pytest.param(3, False, 99.0, 9999.0, [3, 6, 9, 12, 15, 18, 20], id="as set, whatever it costs"),
        pytest.param("auto", False, 3.0, 5.0, list(range(2, 21, 2)), id="auto is a tenth"),
        pytest.param("auto", False, 3.1, 5.0, [20], id="auto leaves out what costs more than 3 %"),
        pytest.param("auto", False, 3.1, 600.0, list(range(1, 21)), id="auto never waits longer than 10 minutes"),
        pytest.param("auto", True, 99.0, 9999.0, list(range(2, 21, 2)), id="a rollback's steps depend on no clock"),
    ],
)
def test_checkpoints_are_saved_when_they_are_worth_it(
    every: int | str, exact: bool, stalled: float, since: float, expected: list[int]
) -> None:
    schedule, _ = cadence.cadence(every, 20, exact=exact)
    due = [
        step
        for step in range(1, 21)
        if cadence.is_checkpoint_step(schedule, step, 20, since=since, stalled=stalled, elapsed=100.0)
    ]
    assert due == expected


def test_a_micro_batch_is_described_in_the_users_unit() -> None:
    assert str(batch_plan.shape(2, "auto", 1024, 100, packed=True)) == "up to 1024 tokens"
    assert str(batch_plan.shape(2, "auto", 1024, 100, packed=False)) == "up to 10 examples"
    assert batch_plan.shape(2, 4, 4 * 128, 100, packed=False).rows == 4
