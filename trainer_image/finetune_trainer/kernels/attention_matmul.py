"""Computes softmax attention with batched matrix products, forward and backward.

The query has the shape (batch, group, rows, size); key and value have the shape (batch, columns,
size). `group` queries share a key (grouped-query attention). If attention is causal, there are as
many rows as columns, and a row attends to no column after its own. Rows are computed in chunks so
that the scores take little memory; if attention is causal, this also means that few scores are
computed only to be masked.

In 16 bits, scores and their gradients are float32, as in flash kernels, and the softmax is rounded
to 16 bits before it is multiplied by anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from finetune_trainer.kernels.attention_inputs import AttentionInputs
from finetune_trainer.kernels.length_buckets import CHUNK

_MAX_SCORES = 2**23  # computed at a time


def forward(inputs: AttentionInputs, *, causal: bool, with_sums: bool) -> tuple[Tensor, Tensor]:
    """Returns (attention in the shape of the query, logarithm of the sums of exponentials).

    The latter has the shape (batch, group, rows) and the accumulation dtype, or is empty without
    `with_sums`.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    dtype = accumulation_dtype(query)
    scaled, keys = query.to(dtype) * inputs.scale, key.to(dtype).transpose(1, 2)
    outs, sums = [], []
    for begin, end, visible in _chunks(query, key, causal):
        scores = _scores(scaled[:, :, begin:end], keys[..., :visible], begin if causal else None)
        probability = torch.softmax(scores, -1)
        if with_sums:
            sums.append(_log_sum(scores, probability).view(*query.shape[:2], -1))
        out = torch.bmm(probability.to(value.dtype), value[:, :visible])
        outs.append(out.view(*query.shape[:2], end - begin, -1))
    return _joined(outs), _joined(sums) if with_sums else query.new_empty(0)


def backward(
    inputs: AttentionInputs, gradient: Tensor, inner: Tensor, log_sums: Tensor | None, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value.

    `inner` is the sum of gradient x attention over the size of a head, (batch, group, rows).
    `log_sums` cover everything that a row attends to, of which these columns are a part; None means
    that these columns are everything. Rows whose `gradient` and `inner` are 0 (padding) contribute
    nothing.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    dtype = accumulation_dtype(query)
    scaled, keys, values = (
        query.to(dtype) * inputs.scale,
        key.to(dtype).transpose(1, 2),
        value.to(dtype).transpose(1, 2),
    )
    by_query, by_key, by_value = [], torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
    batch, group = query.shape[:2]
    for begin, end, visible in _chunks(query, key, causal):
        scores = _scores(scaled[:, :, begin:end], keys[..., :visible], begin if causal else None)
        probability = torch.softmax(scores, -1)
        d_out, mean = _flat(gradient[:, :, begin:end]), inner[:, :, begin:end].reshape(batch, -1, 1)
        if log_sums is not None:
            row_sums = log_sums[:, :, begin:end].reshape(batch, -1)
            fraction = (_log_sum(scores, probability) - row_sums).exp_()[..., None]
            d_out, mean = d_out * fraction.to(d_out.dtype), mean * fraction
        d_scores = torch.bmm(d_out.to(dtype), values[..., :visible]).sub_(mean).mul_(probability).to(key.dtype)
        by_query.append(torch.bmm(d_scores, key[:, :visible]).mul_(inputs.scale).view(batch, group, end - begin, -1))
        by_key[:, :visible] += torch.bmm(d_scores.transpose(1, 2), _flat(query[:, :, begin:end]))
        by_value[:, :visible] += torch.bmm(probability.to(value.dtype).transpose(1, 2), d_out)
    return _joined(by_query), by_key.mul_(inputs.scale), by_value


def _log_sum(scores: Tensor, probability: Tensor) -> Tensor:
    """Returns the logarithm of the sum of exponentials over the last dimension, given its softmax.

    The largest probability is exp(largest score) / sum.
    """
    return scores.amax(-1) - probability.amax(-1).log_()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns float64 for float64, and float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(query: Tensor, key: Tensor, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Yields (first row, end of the rows, number of columns that they attend to) for each chunk."""
    batch, group, rows = query.shape[:3]
    size = min(CHUNK, max(32, _MAX_SCORES // (batch * group * key.shape[1])))
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        yield begin, end, end if causal else key.shape[1]


def _scores(query: Tensor, keys: Tensor, first: int | None) -> Tensor:
    """Returns the scores, (batch, group x rows, columns).

    If `first`, the index of the first row, is given, the last columns are those of the rows
    themselves, and the causal mask is applied to them.
    """
    scores = torch.bmm(_flat(query), keys)
    if first is not None:
        rows = query.shape[2]
        scores.view(*query.shape[:3], -1)[..., first:].add_(_causal_mask(rows, scores.dtype))
    return scores


@lru_cache(maxsize=512)
def _causal_mask(rows: int, dtype: torch.dtype) -> Tensor:
    """Returns a mask of the shape (rows, rows): -inf where the column comes after the row, else
    0."""
    return torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(1)


def _flat(tensor: Tensor) -> Tensor:
    """Reshapes (batch, group, rows, size) to (batch, group x rows, size)."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _joined(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)
