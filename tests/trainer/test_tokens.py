"""A split on its way to disk: the same tokens however many rows go together, little memory, nothing half-written."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer import alike, prefixes, rows, tokens
from finetune_trainer.failure import Failed
from finetune_trainer.render import Example, Renderer
from finetune_trainer.rows import Problem, Row, Turn


def _text(text: str) -> Row:
    return Row(1, (Turn("text", text),), plain=True)


def _pair(prompt: str, answer: str, system: str = "") -> Row:
    first = (Turn("system", system),) if system else ()
    return Row(1, (*first, Turn("user", prompt), Turn("assistant", answer)), plain=not system)


_WORDS = st.text(st.sampled_from("fox dog <|im_end|>é\n🦊"), max_size=12) | st.sampled_from(["", " ", "dog"])
_TURNS = st.lists(
    st.builds(Turn, st.sampled_from(["system", "user", "assistant", "tool"]), _WORDS, st.booleans()), max_size=3
)
_ROWS = st.one_of(
    st.builds(_text, _WORDS),
    st.builds(_pair, _WORDS, _WORDS, _WORDS),
    st.builds(
        lambda before, last, other: Row(
            1, (*before, Turn("assistant", last)), rejected=(*before, Turn("assistant", other)) if other else ()
        ),
        _TURNS, _WORDS, _WORDS,
    ),
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@given(chosen=st.lists(_ROWS, max_size=6), longest=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_rows_rendered_together_are_those_rendered_one_by_one_and_none_is_lost(
    family: str, chosen: list[Row], longest: int, models: dict[str, Path]
) -> None:
    renderer = Renderer.load(models[family], longest)
    found = renderer.render_all(chosen)
    assert found == [renderer.render(row) for row in chosen]
    for one in found:
        if isinstance(one, Problem):
            assert one.message
        else:
            assert 0 < len(one.ids) == len(one.learnt)
            assert any(one.learnt)
            assert not one.learnt[0]


def test_the_cache_holds_what_each_row_renders_to(models: dict[str, Path], tmp_path: Path) -> None:
    given = [{"prompt": "fox " * (i % 7), "completion": f"a dog {i}"} for i in range(600)]
    given[300] = {"prompt": "fox", "completion": ""}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    renderer = Renderer.load(models["llama"], 32)
    cache = tokens.build(tmp_path / "c", "k", path, "dataset.uri", on_invalid="drop", renderer=renderer)
    each = [renderer.render(row) for row in rows.read(path).rows]
    rendered = [one for one in each if isinstance(one, Example)]
    assert 200 < len(rendered) == len(cache) < 599
    for index, one in enumerate(rendered):
        ids, learnt = cache.example(index)
        assert (tuple(ids.tolist()), tuple(learnt.tolist())) == (one.ids, one.learnt)
        assert (cache.label_counts[index], cache.whole[index]) == (sum(one.learnt), one.whole)
    assert cache.numbers.tolist() == [one.number for one in rendered]
    dropped = sorted([301, *(one.number for one in each if isinstance(one, Problem))])
    assert sorted(problem.number for problem in cache.facts.problems) == dropped
    assert cache.facts.dropped == len(dropped)


def test_memory_is_not_that_of_the_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    """Four times the rows, the same peak of what Python and numpy hold."""
    renderer = Renderer.load(models["gpt2"], 4096)

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{i} lazy dog " * 250}) + "\n" for i in range(count)))
        tracemalloc.start()
        cache = tokens.build(tmp_path / "c", str(count), path, "dataset.uri", on_invalid="fail", renderer=renderer)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(cache.ids) > 1000 * count
        return found

    assert peak(400) < 1.3 * peak(100)


def test_rows_that_are_refused_leave_nothing_behind(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a dog"}\n{"text": 7}\n')
    renderer = Renderer.load(models["gpt2"], 64)
    left = tmp_path / "c" / "k.1.tmp"
    left.mkdir(parents=True)
    with pytest.raises(Failed, match="row 2: text isn't a string"):
        tokens.build(tmp_path / "c", "k", path, "dataset.uri", on_invalid="fail", renderer=renderer)
    assert list((tmp_path / "c").iterdir()) == []


@given(
    listed=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=40),
    size=st.integers(1, 30),
)
@settings(max_examples=100, deadline=None)
def test_the_order_by_content_is_the_same_however_little_is_sorted_at_a_time(
    listed: list[list[int]], size: int
) -> None:
    ids = np.array([token for row in listed for token in row], np.int32)
    offsets = np.cumsum([0, *map(len, listed)])
    rank, common = prefixes.find(ids, offsets, together=size)
    assert rank.tolist() == np.argsort(sorted(range(len(listed)), key=lambda row: listed[row])).tolist()
    whole = prefixes.find(ids, offsets)
    assert np.array_equal(rank, whole[0])
    assert np.array_equal(common, whole[1])


def test_what_many_rows_save_is_the_sum_of_what_each_shares() -> None:
    draw = np.random.Generator(np.random.PCG64(3))
    begins = [draw.integers(0, 9, 40) for _ in range(3)]
    listed = [np.concatenate([begins[i % 3][: 8 + i], draw.integers(0, 9, i % 5 + 1)]) for i in range(30)]
    lengths = np.array([len(row) for row in listed])
    found = prefixes.Prefixes(*prefixes.find(np.concatenate(listed).astype(np.int32), np.cumsum([0, *lengths])))
    for index in (np.arange(30), np.array([2, 7, 9, 21]), np.array([4]), np.array([], np.int64)):
        one_by_one = sum(found.shared(found.sorted(index.tolist()), lengths))
        assert found.saved(index, lengths) == one_by_one
    assert found.saved(np.arange(30), lengths) > 200


_ASKED = "Where is my order number {}? I have waited for days."
_ALIKE: list[tuple[str, Row, Row, bool]] = [
    ("case and spaces", _pair("What is  a Fox?", "A dog."), _pair("what is a fox", "a  dog"), True),
    ("numbers", _pair(_ASKED.format(12), "On its way."), _pair(_ASKED.format("7,001"), "On its way."), False),
    ("numbers of like form", _pair(_ASKED.format(12), "Soon."), _pair(_ASKED.format(345), "soon!"), True),
    ("mostly numbers", _pair("12 + 7", "19"), _pair("12 + 8", "20"), False),
    ("numbers under a long system prompt", _pair("1 + 7", "8", _ASKED), _pair("1 + 8", "9", _ASKED), False),
    ("full width", _pair("Ｆｏｘ、", "dog"), _pair("fox ,", "dog"), True),
    ("signs that mean something", _pair("is a < b?", "yes"), _pair("is a > b?", "yes"), False),
    ("vowel signs", _text("की"), _text("कि"), False),
    ("another answer", _pair("Fox?", "a dog"), _pair("fox", "a cat"), False),
    ("who says it", _text("fox dog"), _pair("fox", "dog"), False),
]


@pytest.mark.parametrize(("one", "other", "same"), [pytest.param(*rest, id=id) for id, *rest in _ALIKE])
def test_rows_are_nearly_alike_in_what_is_said(one: Row, other: Row, same: bool) -> None:
    assert (alike.folded(one) == alike.folded(other)) is same
    assert rows.digest(one) != rows.digest(other)


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 7), max_size=30))
@settings(max_examples=100, deadline=None)
def test_the_first_of_equal_digests_is_found(mine: list[int], theirs: list[int]) -> None:
    def digests(values: list[int]) -> Any:
        return np.array([[value, *[0] * 14, value] for value in values], np.uint8).reshape(-1, 16)

    assert alike.first(digests(mine)).tolist() == [mine.index(value) for value in mine]
    expected = [theirs.index(value) if value in theirs else -1 for value in mine]
    assert alike.among(digests(mine), digests(theirs)).tolist() == expected
