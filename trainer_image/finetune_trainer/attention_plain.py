"""Attention over a laid-out row the plainest way: piece by piece, the keys that it sees gathered before it.

For what the kernels of `attention_cpu` and `attention_cuda` don't take (attention dropout, odd head sizes, other
devices), and to compare them with. Called by `documents`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer.layout import Layout


def attend(layout: Layout, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """(1, heads, length, size) → (1, length, heads, size)."""
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for begin, end in layout.pieces:
        before = layout.seen_by(begin)
        keys, values = (
            torch.cat([*(tensor[:, :, first:last] for first, last in before), tensor[:, :, begin:end]], dim=2)
            for tensor in (key, value)
        )
        prefix = keys.shape[2] - (end - begin)
        part = functional.scaled_dot_product_attention(
            query[:, :, begin:end], keys, values,
            attn_mask=_mask(end - begin, prefix, query.device) if prefix else None,
            is_causal=not prefix, dropout_p=dropout, scale=scale, enable_gqa=grouped,
        )  # fmt: skip
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _mask(size: int, prefix: int, device: torch.device) -> Tensor:
    """All of the prefix, and the piece up to the token itself."""
    return torch.ones(size, prefix + size, dtype=torch.bool, device=device).tril(prefix)
