"""Attention over a laid-out row on the CPU: PyTorch's flash kernel, piece by piece and block by block.

A token's attention is a softmax over everything it sees. Pieces and blocks are computed apart, each with the logarithm
of its sum of exponentials, and put together by them; the backward kernel then gets the sums of the whole, so every
part's gradient is exact (the same mathematics as in ring attention, Liu et al. 2023).

Registered as an operator, since torch.compile can't look into loops that differ from row to row. Called by `documents`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.layout import Block, Layout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Below so many tokens the kernel's backward pass is up to three times faster in float32 than in 16 bits.
_LONG = 512

_now: Layout | None = None


@contextmanager
def arranged(layout: Layout | None) -> Iterator[None]:
    """The row that `attend` is about, forward and backward."""
    global _now
    before, _now = _now, layout
    try:
        yield
    finally:
        _now = before


def serves(query: Tensor, value: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[0] == 1 and query.shape[-1] == value.shape[-1]


@torch.library.custom_op("finetune::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(1, heads, length, size) → (1, length, heads, size), and the log of the sums (length, heads).

    Keys and values may have fewer heads (grouped-query attention).
    """
    row = _row()
    heads, length, size = query.shape[1:]
    out = query.new_empty(length, heads, size)
    sums = query.new_empty(length, heads, dtype=_exact(query))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (length, heads, size)
    for begin, end in row.pieces:
        part, log_sum = _call(scale, True, *(_apart(tensor[begin:end], k.shape[1]) for tensor in (q, k, v)))
        out[begin:end], sums[begin:end] = _together(part), _together(log_sum)
    for block in row.blocks:
        part, log_sum = _call(scale, False, *_block(block, q, k, v))
        _merge(out[block.first : block.last], sums[block.first : block.last], _together(part), _together(log_sum))
    return out[None], sums


@torch.library.custom_op("finetune::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped as they are."""
    row = _row()
    heads, kv = query.shape[1], key.shape[1]
    given = [gradient[0], *(tensor[0].transpose(0, 1) for tensor in (query, key, value)), out[0]]
    if row.blocks or any(end - begin < _LONG for begin, end in row.pieces):
        wide = [tensor.to(sums.dtype) for tensor in given]
    dq, dk, dv = (torch.empty(tensor.shape, dtype=sums.dtype) for tensor in given[1:4])
    for begin, end in row.pieces:
        some = given if end - begin >= _LONG else wide
        parts = _back(scale, True, *(_apart(tensor[begin:end], kv) for tensor in (*some, sums)))
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            whole[begin:end] = _summed(part, whole.shape[1])
    for block in row.blocks:
        g, q, k, v, o = wide
        readers = slice(block.first, block.last)
        parts = _back(
            scale,
            False,
            _apart(g[readers], kv),
            *_block(block, q, k, v),
            _apart(o[readers], kv),
            _apart(sums[readers], kv),
        )
        dq[readers] += _summed(parts[0], heads)
        dk[block.begin : block.end] += _summed(parts[1], kv)
        dv[block.begin : block.end] += _summed(parts[2], kv)
    return tuple(whole.to(query.dtype).transpose(0, 1)[None] for whole in (dq, dk, dv))  # type: ignore[return-value]


def _row() -> Layout:
    if _now is None:
        raise RuntimeError("attention over a packed row outside of documents.apart")
    return _now


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _call(scale: float, causal: bool, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """(attention, log of the sums) of query, key, value."""
    part, log_sum = _flash(*tensors, 0.0, causal, scale=scale)
    return part, log_sum


def _back(scale: float, causal: bool, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; of gradient, query, key, value, and the whole attention with its sums."""
    return _flash_backward(*tensors, 0.0, causal, scale=scale)  # type: ignore[no-any-return]


def _apart(tensor: Tensor, kv: int) -> Tensor:
    """(length, heads, …) → (kv heads, queries of each, length, …): a view, grouped queries beside their key."""
    return tensor.view(tensor.shape[0], kv, tensor.shape[1] // kv, *tensor.shape[2:]).movedim(0, 2)


def _together(part: Tensor) -> Tensor:
    """The way back: (kv heads, queries of each, length, …) → (length, heads, …)."""
    return part.movedim(2, 0).flatten(1, 2)


def _summed(part: Tensor, heads: int) -> Tensor:
    """Gradients by token; a key's are summed over the queries that share it."""
    return _together(part) if part.shape[0] * part.shape[1] == heads else part.sum(1).transpose(0, 1)


def _block(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kv, each = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = (_apart(tensor[block.begin : block.end], kv).expand(-1, each, -1, -1) for tensor in (k, v))
    return _apart(q[block.first : block.last], kv), keys, values


def _merge(out: Tensor, sums: Tensor, part: Tensor, log_sum: Tensor) -> None:
    """Adds a block's share to what was seen so far, in place."""
    whole = torch.logaddexp(sums, log_sum)
    old, new = (sums - whole).exp_()[..., None], (log_sum - whole).exp_()[..., None]
    out.copy_(out * old + part * new)
    sums.copy_(whole)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size), query.new_empty(length, heads, dtype=_exact(query))


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
