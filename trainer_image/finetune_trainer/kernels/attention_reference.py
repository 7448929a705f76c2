"""Computes attention over a packed row in the plainest form: segment by segment, with the keys of
its prefixes in front of its own.

It computes what the kernels don't support (attention dropout), and it is the reference that they
are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer.data.batching.packed_layout import Layout


def attend(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scale: float, *, dropout: float = 0.0,
    sinks: Tensor | None = None, window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Computes attention from (1, heads, length, size) to (1, length, heads, size).

    A token attends to the last `window` tokens of its example, itself included, or to all if it is
    0. A `softcap` other than 0 replaces each score s by softcap * tanh(s / softcap). `sinks`,
    (heads,), are scores of a further key whose value is zero.
    """
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for begin, end in layout.segments:
        prefixes = layout.prefix_spans(begin)
        keys, values = (
            torch.cat([*(tensor[:, :, first:last] for first, last in prefixes), tensor[:, :, begin:end]], dim=2)
            for tensor in (key, value)
        )
        prefix = keys.shape[2] - (end - begin)
        own = query[:, :, begin:end]
        if softcap or sinks is not None:
            mask = _mask(end - begin, prefix, window, query.device)
            part = _explicit(own * scale, keys, values, mask, dropout, sinks, softcap)
        else:
            masked = bool(prefix) or 0 < window < end - begin
            part = functional.scaled_dot_product_attention(
                own, keys, values, attn_mask=_mask(end - begin, prefix, window, query.device) if masked else None,
                is_causal=not masked, dropout_p=dropout, scale=scale, enable_gqa=grouped,
            )  # fmt: skip
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, sinks: Tensor | None, softcap: float
) -> Tensor:
    """Computes all scores of a segment, (1, heads, size, prefix + size), at once."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=3)
    probability = torch.softmax(scores, -1)[..., : key.shape[2]]
    return functional.dropout(probability, dropout) @ value


def _mask(size: int, prefix: int, window: int, device: torch.device) -> Tensor:
    """Returns a mask of the shape (size, prefix + size) that is true for each token itself and
    those before it in its example, within the window."""
    mask = torch.ones(size, prefix + size, dtype=torch.bool, device=device).tril(prefix)
    return mask.triu(prefix - window + 1) if window else mask
