"""Computes attention over a packed row on any device and for all options: a window, soft-capped
scores, sinks, shared prefixes, and heads of any size.

Scores are computed in chunks of queries and never stored: the backward pass computes them again
from the logarithm of the softmax denominators, as flash kernels do (Dao et al. 2022). Memory
therefore grows with the number of tokens, not with its square. Without a kernel of its own, it is
slower than those of `attention_cpu` and `attention_cuda`, and it computes what they don't support.

In 16 bits, scores and their gradients are float32, and the softmax is rounded to 16 bits before it
is multiplied by anything, as in `attention_matmul`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.data.batching.packed_layout import Layout
from finetune_trainer.kernels import packed_row
from finetune_trainer.kernels.attention_matmul import accumulation_dtype
from finetune_trainer.kernels.sizes import ATTENTION_SCORES

_MIN_ROWS, _MAX_ROWS = 16, 1024  # queries in a chunk


@torch.library.custom_op("finetune::attend_chunked", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Computes attention from (1, heads, length, size) to (1, length, heads, size of a value).

    Also returns the logarithm of the softmax denominators, (heads, length). Keys and values may
    have fewer heads than queries. A token attends to the last `window` tokens of its example,
    itself included, or to all if it is 0. A `softcap` other than 0 replaces each score s by softcap
    * tanh(s / softcap). `sinks`, (heads,), are scores of a further key whose value is zero. Call it
    inside `packed_row.computing`; otherwise, it raises RuntimeError.
    """
    layout = packed_row.required().layout
    q, k, v = query[0], key[0], value[0]
    out = value.new_empty(query.shape[2], q.shape[0], v.shape[-1])
    log_sums = query.new_empty(q.shape[:2], dtype=accumulation_dtype(query))
    with torch.autocast(query.device.type, enabled=False):
        for piece in _pieces(layout, q.shape[0], window):
            scores, _ = _scores(piece, _grouped(piece.queries(q), k), piece.keys(k), scale, softcap)
            log_sum = torch.logsumexp(scores, -1)
            if sinks is not None:
                log_sum = torch.logaddexp(log_sum, _by_group(sinks, k).to(log_sum.dtype))
            probability = scores.sub_(log_sum[..., None]).exp_()
            part = torch.matmul(_flat(probability.to(v.dtype)), piece.keys(v))
            out[piece.first : piece.last] = part.view(q.shape[0], -1, v.shape[-1]).transpose(0, 1)
            log_sums[:, piece.first : piece.last] = log_sum.flatten(0, 1)
    return out[None], log_sums


@torch.library.custom_op("finetune::attend_chunked_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, out: Tensor, log_sums: Tensor,
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of query, key, value, and sinks, in their shapes; that of missing sinks
    is empty. `out` and `log_sums` are what `attend` returned."""
    layout, dtype = packed_row.required().layout, log_sums.dtype
    q, k, v = query[0], key[0], value[0]
    d_out, by_head = gradient[0].transpose(0, 1), out[0].transpose(0, 1)
    inner = (d_out.to(dtype) * by_head).sum(-1)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for tensor in (k, v))
    with torch.autocast(query.device.type, enabled=False):
        for piece in _pieces(layout, q.shape[0], window):
            own_q, own_k, own_v = _grouped(piece.queries(q), k), piece.keys(k), piece.keys(v)
            scores, slope = _scores(piece, own_q, own_k, scale, softcap)
            probability = scores.sub_(_grouped(piece.queries(log_sums), k)[..., None]).exp_()
            own_d = _flat(_grouped(piece.queries(d_out), k))
            d_scores = torch.matmul(own_d.to(dtype), own_v.to(dtype).transpose(1, 2)).view_as(probability)
            d_scores.sub_(_grouped(piece.queries(inner), k)[..., None]).mul_(probability)
            if slope is not None:
                d_scores.mul_(slope)
            d_scores = _flat(d_scores.to(k.dtype))
            dq[:, piece.first : piece.last] = torch.matmul(d_scores, own_k).mul_(scale).view(q.shape[0], -1, q.shape[2])
            piece.add(dk, torch.matmul(d_scores.transpose(1, 2), _flat(own_q)).mul_(scale))
            piece.add(dv, torch.matmul(_flat(probability.to(v.dtype)).transpose(1, 2), own_d))
    d_sinks = query.new_empty(0) if sinks is None else sink_gradient(sinks, log_sums, inner)
    return dq[None], dk.to(k.dtype)[None], dv.to(v.dtype)[None], d_sinks


def sink_gradient(sinks: Tensor, log_sums: Tensor, inner: Tensor) -> Tensor:
    """Returns the gradient of the sinks, (heads,).

    `log_sums` and `inner` (gradient x attention, summed over the size of a head) have the shape
    (heads, length). A sink's value is zero, so its score has the gradient -probability * inner.
    """
    probability = (sinks.to(log_sums.dtype)[:, None] - log_sums).exp()
    return -(probability * inner).sum(1).to(sinks.dtype)


@dataclass(frozen=True)
class _Piece:
    """Describes the queries [first, last) of the row and the keys that they attend to.

    `spans` are the positions of the keys. The first query attends to no key after the one with the
    index `diagonal`, and the next one to one more. With a `window`, each attends only to the last
    keys.
    """

    first: int
    last: int
    spans: tuple[tuple[int, int], ...]
    diagonal: int
    window: int

    def queries(self, tensor: Tensor) -> Tensor:
        return tensor[:, self.first : self.last]

    def keys(self, tensor: Tensor) -> Tensor:
        parts = [tensor[:, begin:end] for begin, end in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of the keys to `total`, in place."""
        sizes = [end - begin for begin, end in self.spans]
        for (begin, end), part in zip(self.spans, torch.split(gradient, sizes, dim=1), strict=True):
            total[:, begin:end] += part

    def hidden(self, columns: int, device: torch.device) -> Tensor:
        """Returns a mask of the shape (queries, columns), true for keys that aren't attended to."""
        visible = torch.ones(self.last - self.first, columns, dtype=torch.bool, device=device).tril_(self.diagonal)
        if self.window:
            visible.triu_(self.diagonal - self.window + 1)
        return visible.logical_not_()


def _pieces(layout: Layout, heads: int, window: int) -> Iterator[_Piece]:
    for begin, end in layout.segments:
        spans = (*layout.prefix_spans(begin), (begin, end))
        prefix = sum(last - first for first, last in spans[:-1])
        columns = prefix + end - begin
        if window:
            columns = min(columns, window + _MAX_ROWS)
        rows = min(_MAX_ROWS, max(_MIN_ROWS, ATTENTION_SCORES // max(1, heads * columns)))
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            position = prefix + first - begin
            low = max(0, position - window + 1) if window else 0
            yield _Piece(first, last, _within(spans, low, prefix + last - begin), position - low, window)


def _within(spans: Sequence[tuple[int, int]], low: int, high: int) -> tuple[tuple[int, int], ...]:
    """Returns the positions of the keys low … high - 1 of all that the spans list in order."""
    parts, offset = [], 0
    for begin, end in spans:
        first, last = max(begin, begin + low - offset), min(end, begin + high - offset)
        if first < last:
            parts.append((first, last))
        offset += end - begin
    return tuple(parts)


def _scores(piece: _Piece, query: Tensor, key: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Returns (scores of the shape (kv heads, group, queries, keys), the derivative of their
    cap)."""
    dtype = accumulation_dtype(query)
    scores = torch.matmul(_flat(query.to(dtype) * scale), key.to(dtype).transpose(1, 2)).view(*query.shape[:3], -1)
    slope = None
    if softcap:
        capped = scores.div_(softcap).tanh_()
        slope = 1 - capped.square()
        scores = capped.mul_(softcap)
    return scores.masked_fill_(piece.hidden(key.shape[1], key.device), float("-inf")), slope


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """Reshapes (heads, length, …) to (kv heads, group, length, …)."""
    return torch.unflatten(tensor, 0, (key.shape[0], -1))


def _by_group(sinks: Tensor, key: Tensor) -> Tensor:
    return sinks.view(key.shape[0], -1, 1)


def _flat(tensor: Tensor) -> Tensor:
    """Reshapes (kv heads, group, length, …) to (kv heads, group x length, …)."""
    return tensor.flatten(1, 2)


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = value.new_empty(batch, length, heads, value.shape[-1])
    return out, query.new_empty(heads, length, dtype=accumulation_dtype(query))


@attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, out: Tensor, log_sums: Tensor,
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_sinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), d_sinks


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(query, key, value, sinks, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, out, log_sums = ctx.saved_tensors
    dq, dk, dv, d_sinks = attend_backward(
        gradient, query, key, value, sinks, out, log_sums, ctx.scale, ctx.window, ctx.softcap
    )
    return dq, dk, dv, None if sinks is None else d_sinks, None, None, None


attend.register_autograd(_backward, setup_context=_save_for_backward)
