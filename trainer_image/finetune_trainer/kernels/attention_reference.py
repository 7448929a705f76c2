"""Computes attention over a packed row in the plainest form: segment by segment, with the keys of
its prefixes in front of its own.

It computes what the kernels of `attention_cpu` and `attention_cuda` don't support (attention
dropout, unusual head sizes, other devices), and it is the reference that they are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer.data.batching.packed_layout import Layout


def attend(layout: Layout, query: Tensor, key: Tensor, value: Tensor, scale: float, *, dropout: float = 0.0) -> Tensor:
    """Computes attention from (1, heads, length, size) to (1, length, heads, size)."""
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for begin, end in layout.segments:
        prefixes = layout.prefix_spans(begin)
        keys, values = (
            torch.cat([*(tensor[:, :, first:last] for first, last in prefixes), tensor[:, :, begin:end]], dim=2)
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
    """Returns a mask of the shape (size, prefix + size) that is true for all of the prefix and,
    within the segment, for each token itself and those before it."""
    return torch.ones(size, prefix + size, dtype=torch.bool, device=device).tril(prefix)
