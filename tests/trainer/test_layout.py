"""A laid-out row: every example's tokens once, what is shared once for all, and attention over it that is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from finetune_trainer import attention_cpu, attention_plain, attention_products, layout, prefixes, stacking

_SMALL = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=40), min_size=1, max_size=12)


def _row(rows: list[list[int]]) -> tuple[list[list[int]], tuple[int, ...], layout.Row]:
    """Rows of tokens in the order of their content, what each shares, and how they are laid."""
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    whole = prefixes.Prefixes(*prefixes.find(ids, offsets))
    lengths = np.diff(offsets)
    ordered = whole.sorted(range(len(rows)))
    shared = whole.shared(ordered, lengths)
    return [rows[i] for i in ordered], shared, layout.lay([len(rows[i]) for i in ordered], shared)


def _seen(row: layout.Layout) -> np.ndarray:
    """[reader, read] as pieces and blocks say."""
    seen = np.zeros((row.size, row.size), dtype=int)
    for begin, end in row.pieces:
        seen[begin:end, begin:end] += np.tril(np.ones((end - begin, end - begin), dtype=int))
    for block in row.blocks:
        seen[block.first : block.last, block.begin : block.end] += 1
    return seen


@given(_SMALL, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_a_token_sees_the_beginning_of_its_own_example_once_and_nothing_else(rows: list[list[int]], least: int) -> None:
    before, layout.LEAST_SHARED = layout.LEAST_SHARED, least
    try:
        ordered, shared, row = _row(rows)
    finally:
        layout.LEAST_SHARED = before
    expected = np.zeros((row.layout.size, row.layout.size), dtype=int)
    tokens: dict[int, int] = {}
    for example, places in zip(ordered, row.places, strict=True):
        assert len(places) == len(example)
        for depth, place in enumerate(places):
            assert tokens.setdefault(int(place), example[depth]) == example[depth]
            expected[place, places[: depth + 1]] = 1
    assert sum(map(len, rows)) - sum(shared) == len(tokens)
    assert row.layout.size == layout.filled(len(tokens))
    padding = slice(len(tokens), row.layout.size)
    expected[padding, padding] = np.tril(np.ones_like(expected[padding, padding]))
    assert (_seen(row.layout) == expected).all()


def test_shared_beginnings_are_found_in_any_depth() -> None:
    system, one, two = [7] * 20, [8] * 18, [9] * 17
    rows = [[*system, *one, 1, 2], [5, 5], [*system, *two, 3], [*system, *one, 4], [*system, *two, 6, 6, 6]]
    ordered, shared, row = _row(rows)
    assert shared == (0, 0, 38, 20, 37)
    assert row.layout.size == 2 + 20 + 18 + 17 + 2 + 1 + 1 + 3
    assert ordered[0] == [5, 5]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize(("heads", "kv"), [(6, 2), (3, 3)])
@pytest.mark.parametrize("chunk", [40, 256])
def test_attention_and_its_gradients_equal_one_masked_attention(
    dtype: torch.dtype, tolerance: float, heads: int, kv: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (stacking, attention_products):
        monkeypatch.setattr(room, "CHUNK", chunk)
    torch.manual_seed(0)
    row = layout.lay([90, 95, 60, 20, 33, 60, 20, 25, 21], [0, 70, 50, 0, 16, 20, 0, 0, 0])
    size = row.layout.size
    query, key, value = (
        torch.randn(1, size, count, 16).to(dtype).transpose(1, 2).requires_grad_() for count in (heads, kv, kv)
    )
    weight = torch.randn(1, size, heads, 16).to(dtype)
    mask = torch.tensor(_seen(row.layout) > 0)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    whole = functional.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    expected = [whole, *torch.autograd.grad(whole, exact, weight.double())]
    with attention_cpu.arranged(row.layout):
        fast = attention_cpu.attend(query, key, value, 0.3)[0]
        got = [fast, *torch.autograd.grad(fast, (query, key, value), weight)]
    plain = attention_plain.attend(row.layout, query, key, value, 0.3, 0.0)
    for ours in (got, [plain, *torch.autograd.grad(plain, (query, key, value), weight)]):
        for mine, theirs in zip(ours, expected, strict=True):
            assert (mine.double() - theirs).abs().max() < tolerance


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_every_token_lies_in_one_stack_and_padding_is_marked(lengths: list[int]) -> None:
    row = layout.lay(lengths, [0] * len(lengths)).layout
    found = stacking.stacks(row.pieces)
    places = np.concatenate([stack.places().ravel() for stack in found])
    assert sorted(places[places >= 0]) == list(range(row.size))
    assert sorted(piece for stack in found for piece in stack.pieces) == sorted(row.pieces)
    for stack in found:
        assert stack.size == max(end - begin for begin, end in stack.pieces)
        assert len(stack.pieces) == 1 or stack.size <= stacking.CHUNK


def test_pieces_of_like_length_are_stacked_and_unlike_ones_are_not() -> None:
    sizes = [[end - begin for begin, end in stack.pieces] for stack in _stacks([100, 98, 97] + [10] * 20)]
    assert sizes == [[100, 98, 97], [10] * 20]
    assert len(_stacks([30, 31])) == 1


def _stacks(lengths: list[int]) -> tuple[stacking.Stack, ...]:
    return stacking.stacks(layout.lay(lengths, [0] * len(lengths)).layout.pieces[: len(lengths)])
