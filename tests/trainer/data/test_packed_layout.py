"""A packed row contains every example's tokens, each shared prefix once, and attention over it is
exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from finetune_trainer.data import shared_prefixes
from finetune_trainer.data.batching import packed_layout
from finetune_trainer.kernels import attention_cpu, attention_matmul, attention_reference, length_buckets, packed_row

_SMALL = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=40), min_size=1, max_size=12)


def _row(rows: list[list[int]]) -> tuple[list[list[int]], tuple[int, ...], packed_layout.PackedRow]:
    """Returns the rows of tokens sorted by content, how many tokens each shares, and the packed
    row."""
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    prefixes = shared_prefixes.SharedPrefixes(*shared_prefixes.find(ids, offsets))
    lengths = np.diff(offsets)
    ordered = prefixes.sorted(range(len(rows)))
    shared = prefixes.shared(ordered, lengths)
    return [rows[i] for i in ordered], shared, packed_layout.pack([len(rows[i]) for i in ordered], shared)


def _visible(row: packed_layout.Layout) -> np.ndarray:
    """Returns how often each token attends to each other one, as [query, key], by the segments and
    blocks."""
    visible = np.zeros((row.size, row.size), dtype=int)
    for begin, end in row.segments:
        visible[begin:end, begin:end] += np.tril(np.ones((end - begin, end - begin), dtype=int))
    for block in row.blocks:
        visible[block.first : block.last, block.begin : block.end] += 1
    return visible


@given(_SMALL, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_a_token_attends_to_its_own_example_so_far_once_and_to_nothing_else(rows: list[list[int]], least: int) -> None:
    default, packed_layout.LEAST_SHARED = packed_layout.LEAST_SHARED, least
    try:
        ordered, shared, row = _row(rows)
    finally:
        packed_layout.LEAST_SHARED = default
    expected = np.zeros((row.layout.size, row.layout.size), dtype=int)
    tokens: dict[int, int] = {}
    for example, positions in zip(ordered, row.positions, strict=True):
        assert len(positions) == len(example)
        for depth, position in enumerate(positions):
            assert tokens.setdefault(int(position), example[depth]) == example[depth]
            expected[position, positions[: depth + 1]] = 1
    assert sum(map(len, rows)) - sum(shared) == len(tokens)
    assert row.layout.size == packed_layout.rounded_up(len(tokens))
    longest = max(map(len, ordered))
    for begin in range(len(tokens), row.layout.size, longest):
        span = slice(begin, min(begin + longest, row.layout.size))
        expected[span, span] = np.tril(np.ones_like(expected[span, span]))
    copied = [tokens[int(position)] for position in row.padding]
    example = next(example for example in ordered if len(example) == longest)
    assert copied == (example * (len(copied) // longest + 1))[: len(copied)]
    assert (_visible(row.layout) == expected).all()


def test_shared_prefixes_are_found_at_any_depth() -> None:
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
    for module in (length_buckets, attention_matmul):
        monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    row = packed_layout.pack([90, 95, 60, 20, 33, 60, 20, 25, 21], [0, 70, 50, 0, 16, 20, 0, 0, 0])
    size = row.layout.size
    query, key, value = (
        torch.randn(1, size, count, 16).to(dtype).transpose(1, 2).requires_grad_() for count in (heads, kv, kv)
    )
    weight = torch.randn(1, size, heads, 16).to(dtype)
    mask = torch.tensor(_visible(row.layout) > 0)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    attended = functional.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True)
    attended = attended.transpose(1, 2)
    expected = [attended, *torch.autograd.grad(attended, exact, weight.double())]
    with packed_row.computing(row.layout):
        fast = attention_cpu.attend(query, key, value, 0.3)[0]
        fast_results = [fast, *torch.autograd.grad(fast, (query, key, value), weight)]
    reference = attention_reference.attend(row.layout, query, key, value, 0.3)
    for results in (fast_results, [reference, *torch.autograd.grad(reference, (query, key, value), weight)]):
        for tensor, exact_tensor in zip(results, expected, strict=True):
            assert (tensor.double() - exact_tensor).abs().max() < tolerance


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_every_token_is_in_one_bucket_and_padding_is_marked(lengths: list[int]) -> None:
    row = packed_layout.pack(lengths, [0] * len(lengths)).layout
    buckets = length_buckets.length_buckets(row.segments)
    positions = np.concatenate([bucket.positions().ravel() for bucket in buckets])
    assert sorted(positions[positions >= 0]) == list(range(row.size))
    assert sorted(segment for bucket in buckets for segment in bucket.segments) == sorted(row.segments)
    for bucket in buckets:
        assert bucket.size == max(end - begin for begin, end in bucket.segments)
        assert len(bucket.segments) == 1 or bucket.size <= length_buckets.CHUNK


def test_segments_of_similar_length_share_a_bucket_and_others_dont() -> None:
    sizes = [[end - begin for begin, end in bucket.segments] for bucket in _buckets([100, 98, 97] + [10] * 20)]
    assert sizes == [[100, 98, 97], [10] * 20]
    assert len(_buckets([30, 31])) == 1


def _buckets(lengths: list[int]) -> tuple[length_buckets.LengthBucket, ...]:
    return length_buckets.length_buckets(
        packed_layout.pack(lengths, [0] * len(lengths)).layout.segments[: len(lengths)]
    )
