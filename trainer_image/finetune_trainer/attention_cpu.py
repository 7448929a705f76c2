"""Attention over a laid-out row on the CPU: in bfloat16 by the compiled kernel where there is one, else by batched
matrix products over stacks of pieces, and over blocks.

A token's attention is a softmax over everything it sees. Pieces and blocks are computed apart, each with the logarithm
of its sum of exponentials, and put together by them; the backward pass then gets the sums of the whole, so every
part's gradient is exact (the same mathematics as in ring attention, Liu et al. 2023). PyTorch's flash kernel takes a
product for every head and 32 queries instead, which costs several times as much for short examples.

Registered as an operator, since torch.compile can't look into loops that differ from row to row. Called by `documents`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer import attention_native as native
from finetune_trainer import attention_products as products
from finetune_trainer.layout import Block, Layout
from finetune_trainer.stacking import Stack, stacks

_now: _Row | None = None


@contextmanager
def arranged(layout: Layout | None) -> Iterator[None]:
    """The row that `attend` is about, forward and backward."""
    global _now
    before, _now = _now, None if layout is None else _Row(layout)
    try:
        yield
    finally:
        _now = before


def serves(query: Tensor, value: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[0] == 1 and query.shape[-1] == value.shape[-1]


@torch.library.custom_op("finetune::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(1, heads, length, size) → (1, length, heads, size), and the log of the sums (length, heads): zeros where nothing
    is put together.

    Keys and values may have fewer heads (grouped-query attention).
    """
    row = _row()
    if native.serves(query, key):
        out, sums = row.native.forward(*_seen_by_token(query, key, value), scale)
        return out[None], sums
    q, k, v = (_by_token(tensor) for tensor in (query, key, value))
    laid = row.laid(q.shape[1], k.shape[1])
    queries, keys, values = laid.queries(q), laid.keys(k), laid.keys(v)
    merging = bool(row.layout.blocks)
    outs, logs = [], []
    for stack in laid.stacks:
        some = stack.query(queries), stack.key(keys), stack.key(values)
        part, log_sum = products.forward(*some, scale, causal=True, with_sums=merging)
        outs.append(part.flatten(0, 2))
        logs.append(log_sum.flatten())
    out = laid.by_query(outs)
    sums = laid.by_query(logs) if merging else out.new_zeros(out.shape[:2], dtype=products.exact(query))
    for block in row.layout.blocks:
        part, log_sum = products.forward(*_block(block, q, k, v), scale, causal=False, with_sums=True)
        _merge(out[block.first : block.last], sums[block.first : block.last], _together(part), _together(log_sum))
    return out[None], sums


@torch.library.custom_op("finetune::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped as they are."""
    row = _row()
    if native.serves(query, key):
        found = row.native.backward(gradient[0], *_seen_by_token(query, key, value), out[0], sums, scale)
        return tuple(tensor.transpose(0, 1)[None] for tensor in found)  # type: ignore[return-value]
    q, k, v = (_by_token(tensor) for tensor in (query, key, value))
    g = gradient[0].contiguous()
    inner = (g.to(sums.dtype) * out[0]).sum(-1)
    laid = row.laid(q.shape[1], k.shape[1])
    gradients, inners = laid.counting(g), laid.counting(inner)
    queries, keys, values = laid.queries(q), laid.keys(k), laid.keys(v)
    whole_sums = laid.queries(sums) if row.layout.blocks else None
    parts = []
    for stack in laid.stacks:
        found = products.backward(
            stack.query(gradients), stack.query(queries), stack.key(keys), stack.key(values), stack.query(inners),
            None if whole_sums is None else stack.query(whole_sums), scale, causal=True,
        )  # fmt: skip
        parts.append((found[0].flatten(0, 2), found[1].flatten(0, 1), found[2].flatten(0, 1)))
    by_query, by_key, by_value = zip(*parts, strict=True)
    dq, dk, dv = laid.by_query(by_query), laid.by_key(by_key), laid.by_key(by_value)
    for block in row.layout.blocks:
        readers, kv = slice(block.first, block.last), k.shape[1]
        found = products.backward(
            _apart(g[readers], kv), *_block(block, q, k, v), _apart(inner[readers], kv), _apart(sums[readers], kv),
            scale, causal=False,
        )  # fmt: skip
        dq[readers] += _together(found[0])
        dk[block.begin : block.end] += found[1].transpose(0, 1)
        dv[block.begin : block.end] += found[2].transpose(0, 1)
    return tuple(whole.to(query.dtype).transpose(0, 1)[None] for whole in (dq, dk, dv))  # type: ignore[return-value]


class _Row:
    """A layout, and what is made of it once."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.native = native.Row(layout)
        self._laid: dict[tuple[int, int], _Laid] = {}

    def laid(self, heads: int, kv: int) -> _Laid:
        if (heads, kv) not in self._laid:
            self._laid[heads, kv] = _Laid(stacks(self.layout.pieces), self.layout.size, heads, kv)
        return self._laid[heads, kv]


@dataclass(frozen=True)
class _Stack:
    """Its share of all stacks' rows; `shape` is (pieces x kv heads, queries of a key, padded length)."""

    shape: tuple[int, int, int]
    queries: slice
    keys: slice

    def query(self, tensor: Tensor) -> Tensor:
        return tensor[self.queries].view(*self.shape, *tensor.shape[1:])

    def key(self, tensor: Tensor) -> Tensor:
        return tensor[self.keys].view(self.shape[0], self.shape[2], *tensor.shape[1:])


class _Laid:
    """Where each token's heads lie in the stacks, and the way back."""

    def __init__(self, some: tuple[Stack, ...], length: int, heads: int, kv: int) -> None:
        each = heads // kv
        by_query, by_key, self.stacks = [], [], []
        at = [0, 0]
        for stack in some:
            places = stack.places()
            shape = (len(places) * kv, each, stack.size)
            head = np.arange(heads).reshape(1, kv, each, 1)
            padding = places[:, None, None, :] < 0
            by_query.append(np.where(padding, -1, places[:, None, None, :] * heads + head).ravel())
            by_key.append(np.where(padding[:, 0], -1, places[:, None, :] * kv + np.arange(kv)[None, :, None]).ravel())
            sizes = len(by_query[-1]), len(by_key[-1])
            self.stacks.append(_Stack(shape, slice(at[0], at[0] + sizes[0]), slice(at[1], at[1] + sizes[1])))
            at = [at[0] + sizes[0], at[1] + sizes[1]]
        self._length = length
        self._of_query, self._to_query = _both_ways(np.concatenate(by_query), length * heads)
        self._of_key, self._to_key = _both_ways(np.concatenate(by_key), length * kv)
        self._or_zero = torch.as_tensor(np.concatenate(by_query) % (length * heads + 1))

    def queries(self, tensor: Tensor) -> Tensor:
        """(length, heads, …) → all stacks' rows; padding repeats a token."""
        return tensor.flatten(0, 1).index_select(0, self._of_query)

    def keys(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1).index_select(0, self._of_key)

    def counting(self, tensor: Tensor) -> Tensor:
        """As `queries`, but padding is 0."""
        return torch.cat([tensor.flatten(0, 1), tensor.new_zeros(1, *tensor.shape[2:])]).index_select(0, self._or_zero)

    def by_query(self, parts: Sequence[Tensor]) -> Tensor:
        """The stacks' rows → (length, heads, …)."""
        return _unflat(torch.cat(list(parts)).index_select(0, self._to_query), self._length)

    def by_key(self, parts: Sequence[Tensor]) -> Tensor:
        return _unflat(torch.cat(list(parts)).index_select(0, self._to_key), self._length)


def _both_ways(index: NDArray[np.int64], size: int) -> tuple[Tensor, Tensor]:
    """(rows to take; -1 becomes 0, place of each of `size` rows among those that were taken)"""
    back = np.empty(size, dtype=np.int64)
    real = np.flatnonzero(index >= 0)
    back[index[real]] = real
    return torch.as_tensor(np.maximum(index, 0)), torch.as_tensor(back)


def _unflat(tensor: Tensor, length: int) -> Tensor:
    """(length x heads, …) → (length, heads, …)."""
    return tensor.view(length, len(tensor) // length, *tensor.shape[1:])


def _row() -> _Row:
    if _now is None:
        raise RuntimeError("attention over a packed row outside of documents.apart")
    return _now


def _seen_by_token(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)


def _by_token(tensor: Tensor) -> Tensor:
    """(1, heads, length, size) → (length, heads, size)."""
    return tensor[0].transpose(0, 1).contiguous()


def _apart(tensor: Tensor, kv: int) -> Tensor:
    """(length, heads, …) → (kv heads, queries of each, length, …)."""
    return tensor.view(len(tensor), kv, tensor.shape[1] // kv, *tensor.shape[2:]).movedim(0, 2)


def _together(part: Tensor) -> Tensor:
    """The way back: (kv heads, queries of each, length, …) → (length, heads, …)."""
    return part.movedim(2, 0).flatten(1, 2)


def _block(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (tensor[block.begin : block.end].transpose(0, 1) for tensor in (k, v))
    return _apart(q[block.first : block.last], k.shape[1]), keys, values


def _merge(out: Tensor, sums: Tensor, part: Tensor, log_sum: Tensor) -> None:
    """Adds a block's share to what was seen so far, in place."""
    whole = torch.logaddexp(sums, log_sum)
    old, new = (sums - whole).exp_()[..., None], (log_sum - whole).exp_()[..., None]
    out.copy_(out * old + part * new)
    sums.copy_(whole)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size), query.new_empty(length, heads, dtype=products.exact(query))


@attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        tensor.new_empty(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3]).transpose(1, 2)
        for tensor in (query, key, value)
    )


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    query, key, value, out, sums = ctx.saved_tensors
    return *attend_backward(gradient, query, key, value, out, sums, ctx.scale), None


attend.register_autograd(_backward, setup_context=_remember)
