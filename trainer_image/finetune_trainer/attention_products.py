"""Softmax attention by batched matrix products, forward and backward. Called by `attention_cpu`.

Shapes: query (batch, each, rows, size), key and value (batch, columns, size): `each` queries share a key (grouped-query
attention). Causal: rows = columns, and a row sees no column after its own. Rows are taken some at a time, so that the
scores stay small; causal ones then compute little that nobody sees.

In 16 bits, scores and their gradients are float32, as in flash kernels; the softmax is 16 bits wide where it
multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from finetune_trainer.stacking import CHUNK

_SCORES = 2**23  # at once


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """(attention like query, log of the sums of exponentials (batch, each, rows) in the exact format, or nothing)."""
    kind = exact(query)
    wide, keys = query.to(kind) * scale, key.to(kind).transpose(1, 2)
    outs, sums = [], []
    for begin, end, seen in _chunks(query, key, causal):
        scores = _scores(wide[:, :, begin:end], keys[..., :seen], begin if causal else None)
        share = torch.softmax(scores, -1)
        if with_sums:
            sums.append(_log_sum(scores, share).view(*query.shape[:2], -1))
        outs.append(torch.bmm(share.to(value.dtype), value[:, :seen]).view(*query.shape[:2], end - begin, -1))
    return _whole(outs), _whole(sums) if with_sums else query.new_empty(0)


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, inner: Tensor, sums: Tensor | None, scale: float, *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value. `inner` is the sum of gradient x attention (batch, each, rows). `sums` are
    those of the whole that this is a part of; None: it's the whole. Rows whose gradient and inner are 0 don't count."""
    kind = exact(query)
    wide, keys, values = query.to(kind) * scale, key.to(kind).transpose(1, 2), value.to(kind).transpose(1, 2)
    by_query, by_key, by_value = [], torch.zeros_like(key, dtype=kind), torch.zeros_like(value, dtype=kind)
    batch, each = query.shape[:2]
    for begin, end, seen in _chunks(query, key, causal):
        scores = _scores(wide[:, :, begin:end], keys[..., :seen], begin if causal else None)
        share = torch.softmax(scores, -1)
        given, mean = _flat(gradient[:, :, begin:end]), inner[:, :, begin:end].reshape(batch, -1, 1)
        if sums is not None:
            part = (_log_sum(scores, share) - sums[:, :, begin:end].reshape(batch, -1)).exp_()[..., None]
            given, mean = given * part.to(given.dtype), mean * part
        slope = torch.bmm(given.to(kind), values[..., :seen]).sub_(mean).mul_(share).to(key.dtype)
        by_query.append(torch.bmm(slope, key[:, :seen]).mul_(scale).view(batch, each, end - begin, -1))
        by_key[:, :seen] += torch.bmm(slope.transpose(1, 2), _flat(query[:, :, begin:end]))
        by_value[:, :seen] += torch.bmm(share.to(value.dtype).transpose(1, 2), given)
    return _whole(by_query), by_key.mul_(scale), by_value


def _log_sum(scores: Tensor, share: Tensor) -> Tensor:
    """Of the last dimension, from its softmax: the largest share is 1 over the sum."""
    return scores.amax(-1) - share.amax(-1).log_()


def exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(query: Tensor, key: Tensor, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first row, last, columns that they see)"""
    batch, each, rows = query.shape[:3]
    size = min(CHUNK, max(32, _SCORES // (batch * each * key.shape[1])))
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        yield begin, end, end if causal else key.shape[1]


def _scores(query: Tensor, keys: Tensor, first: int | None) -> Tensor:
    """(batch, each x rows, columns). `first` row: the rows' own columns come last, and are masked."""
    scores = torch.bmm(_flat(query), keys)
    if first is not None:
        rows = query.shape[2]
        scores.view(*query.shape[:3], -1)[..., first:].add_(_later(rows, scores.dtype))
    return scores


@lru_cache(maxsize=512)
def _later(rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, rows): -inf where the column comes after the row."""
    return torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
