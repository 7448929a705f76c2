"""A split on its way to disk: the tokens don't depend on how many rows are rendered together,
little memory is used, and no partial cache is left."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data import dedup, shared_prefixes, token_cache
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.example import Example
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.data.reading import rows
from finetune_trainer.data.reading.row import Problem, Row, Turn
from finetune_trainer.errors import RunError


def _text(text: str) -> Row:
    return Row(1, (Turn("text", text),), plain=True)


def _pair(prompt: str, answer: str, system: str = "") -> Row:
    system_turns = (Turn("system", system),) if system else ()
    return Row(1, (*system_turns, Turn("user", prompt), Turn("assistant", answer)), plain=not system)


_PHRASES = st.text(st.sampled_from("fox dog <|im_end|>é\n🦊"), max_size=12) | st.sampled_from(["", " ", "dog"])
_TURNS = st.lists(
    st.builds(Turn, st.sampled_from(["system", "user", "assistant", "tool"]), _PHRASES, st.booleans()), max_size=3
)
_ROWS = st.one_of(
    st.builds(_text, _PHRASES),
    st.builds(_pair, _PHRASES, _PHRASES, _PHRASES),
    st.builds(
        lambda before, last, other: Row(
            1, (*before, Turn("assistant", last)), rejected=(*before, Turn("assistant", other)) if other else ()
        ),
        _TURNS, _PHRASES, _PHRASES,
    ),
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@given(chosen=st.lists(_ROWS, max_size=6), longest=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_rows_rendered_together_equal_those_rendered_one_by_one_and_none_is_lost(
    family: str, chosen: list[Row], longest: int, models: dict[str, Path]
) -> None:
    renderer = Renderer.load(models[family], longest)
    rendered = renderer.render_all(chosen)
    assert rendered == [renderer.render(row) for row in chosen]
    for example in rendered:
        if isinstance(example, Problem):
            assert example.message
        else:
            assert 0 < len(example.ids) == len(example.loss_mask)
            assert any(example.loss_mask)
            assert not example.loss_mask[0]


def test_the_cache_contains_the_tokens_of_each_rendered_row(models: dict[str, Path], tmp_path: Path) -> None:
    lines = [{"prompt": "fox " * (i % 7), "completion": f"a dog {i}"} for i in range(600)]
    lines[300] = {"prompt": "fox", "completion": ""}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    renderer = Renderer.load(models["llama"], 32)
    cache = token_cache.build(tmp_path / "c", "k", path, ReadOptions("dataset.uri", renderer, "drop"))
    results = [renderer.render(row) for row in rows.read(path).rows]
    rendered = [example for example in results if isinstance(example, Example)]
    assert 200 < len(rendered) == len(cache) < 599
    for index, example in enumerate(rendered):
        ids, loss_mask = cache.example(index)
        assert (tuple(ids.tolist()), tuple(loss_mask.tolist())) == (example.ids, example.loss_mask)
        assert (cache.label_counts[index], cache.uncut_lengths[index]) == (sum(example.loss_mask), example.uncut_length)
    assert cache.line_numbers.tolist() == [example.number for example in rendered]
    dropped = sorted([301, *(example.number for example in results if isinstance(example, Problem))])
    assert sorted(problem.number for problem in cache.facts.problems) == dropped
    assert cache.facts.dropped == len(dropped)


def test_memory_doesnt_grow_with_the_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    """Four times the rows have the same peak of memory in Python and numpy."""
    renderer = Renderer.load(models["gpt2"], 4096)

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{i} lazy dog " * 250}) + "\n" for i in range(count)))
        tracemalloc.start()
        cache = token_cache.build(tmp_path / "c", str(count), path, ReadOptions("dataset.uri", renderer, "fail"))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(cache.ids) > 1000 * count
        return peak_bytes

    assert peak(400) < 1.3 * peak(100)


def test_rejected_rows_leave_no_partial_cache(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a dog"}\n{"text": 7}\n')
    renderer = Renderer.load(models["gpt2"], 64)
    partial = tmp_path / "c" / "k.1.tmp"
    partial.mkdir(parents=True)
    with pytest.raises(RunError, match="row 2: text is 7, which isn't text"):
        token_cache.build(tmp_path / "c", "k", path, ReadOptions("dataset.uri", renderer, "fail"))
    assert list((tmp_path / "c").iterdir()) == []


@given(
    token_rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=40),
    size=st.integers(1, 30),
)
@settings(max_examples=100, deadline=None)
def test_the_order_by_content_is_the_same_however_little_is_sorted_at_a_time(
    token_rows: list[list[int]], size: int
) -> None:
    ids = np.array([token for row in token_rows for token in row], np.int32)
    offsets = np.cumsum([0, *map(len, token_rows)])
    rank, common = shared_prefixes.find(ids, offsets, sorted_tokens=size)
    assert rank.tolist() == np.argsort(sorted(range(len(token_rows)), key=lambda row: token_rows[row])).tolist()
    unlimited = shared_prefixes.find(ids, offsets)
    assert np.array_equal(rank, unlimited[0])
    assert np.array_equal(common, unlimited[1])


def test_many_rows_save_the_sum_of_what_each_shares() -> None:
    random = np.random.Generator(np.random.PCG64(3))
    beginnings = [random.integers(0, 9, 40) for _ in range(3)]
    token_rows = [np.concatenate([beginnings[i % 3][: 8 + i], random.integers(0, 9, i % 5 + 1)]) for i in range(30)]
    lengths = np.array([len(row) for row in token_rows])
    prefixes = shared_prefixes.SharedPrefixes(
        *shared_prefixes.find(np.concatenate(token_rows).astype(np.int32), np.cumsum([0, *lengths]))
    )
    for index in (np.arange(30), np.array([2, 7, 9, 21]), np.array([4]), np.array([], np.int64)):
        one_by_one = sum(prefixes.shared(prefixes.sorted(index.tolist()), lengths))
        assert prefixes.saved(index, lengths) == one_by_one
    assert prefixes.saved(np.arange(30), lengths) > 200


_QUESTION = "Where is my order number {}? I have waited for days."
_NEAR_DUPLICATES: list[tuple[str, Row, Row, bool]] = [
    ("case and spaces", _pair("What is  a Fox?", "A dog."), _pair("what is a fox", "a  dog"), True),
    ("numbers", _pair(_QUESTION.format(12), "On its way."), _pair(_QUESTION.format("7,001"), "On its way."), False),
    ("numbers of similar form", _pair(_QUESTION.format(12), "Soon."), _pair(_QUESTION.format(345), "soon!"), True),
    ("mostly numbers", _pair("12 + 7", "19"), _pair("12 + 8", "20"), False),
    ("numbers under a long system prompt", _pair("1 + 7", "8", _QUESTION), _pair("1 + 8", "9", _QUESTION), False),
    ("full width", _pair("Ｆｏｘ、", "dog"), _pair("fox ,", "dog"), True),
    ("signs that mean something", _pair("is a < b?", "yes"), _pair("is a > b?", "yes"), False),
    ("vowel signs", _text("की"), _text("कि"), False),
    ("another answer", _pair("Fox?", "a dog"), _pair("fox", "a cat"), False),
    ("another role", _text("fox dog"), _pair("fox", "dog"), False),
]


@pytest.mark.parametrize(("one", "other", "same"), [pytest.param(*rest, id=id) for id, *rest in _NEAR_DUPLICATES])
def test_near_duplicates_are_rows_with_nearly_the_same_text(one: Row, other: Row, same: bool) -> None:
    assert (dedup.near_duplicate_digest(one) == dedup.near_duplicate_digest(other)) is same
    assert rows.digest(one) != rows.digest(other)


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 7), max_size=30))
@settings(max_examples=100, deadline=None)
def test_the_first_of_equal_digests_is_found(mine: list[int], theirs: list[int]) -> None:
    def digests(values: list[int]) -> Any:
        return np.array([[value, *[0] * 14, value] for value in values], np.uint8).reshape(-1, 16)

    assert dedup.first_occurrence(digests(mine)).tolist() == [mine.index(value) for value in mine]
    expected = [theirs.index(value) if value in theirs else -1 for value in mine]
    assert dedup.first_match(digests(mine), digests(theirs)).tolist() == expected
