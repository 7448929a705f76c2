"""Attention over a laid-out row on CUDA: PyTorch's variable-length flash attention, one call a layer.

Each piece is a sequence of its own; where it sees a shared beginning, that one's keys are gathered before its own, and
the kernel's causal mask ends at the last key. Gathering adds the gradients of all readers up. 16-bit numbers only.
Called by `documents`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import varlen

from finetune_trainer.layout import Layout


@dataclass(frozen=True)
class Arranged:
    """Borders of the sequences (cumulated), the longest of each, and which keys they see (None: their own)."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    places: Tensor | None

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Arranged:
        own = [np.arange(begin, end) for begin, end in layout.pieces]
        seen = [np.concatenate([*(np.arange(*part) for part in layout.seen_by(piece[0])), piece]) for piece in own]
        places = torch.as_tensor(np.concatenate(seen), device=device) if layout.blocks else None
        longest = [max(len(piece) for piece in pieces) for pieces in (own, seen)]
        return cls(_borders(own, device), _borders(seen, device), longest[0], longest[1], places)


def _borders(pieces: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    return torch.as_tensor(np.cumsum([0, *(len(piece) for piece in pieces)]), dtype=torch.int32, device=device)


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes them."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and half and query.shape[0] == 1 and query.shape[-1] == value.shape[-1] <= 256


def attend(row: Arranged, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(1, heads, length, size) → (1, length, heads, size)."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if row.places is not None:
        k, v = k.index_select(0, row.places), v.index_select(0, row.places)
    out = varlen.varlen_attn(
        q, k, v, row.queries, row.keys, row.longest_query, row.longest_key, scale=scale, window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return cast(Tensor, out)[None]
