"""Attention that keeps packed examples apart: each one's queries meet its own keys only.

Registered with Transformers under NAME by `model`; `loss` says with `apart` where one example ends and the next
begins. Nothing is computed for pairs of different examples, so a packed row costs what its examples cost.
Without `apart` it is Transformers' own sdpa attention. Not for layers that mix tokens elsewhere (recurrent, sliding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "finetune_documents"

# One thread computes one micro-batch at a time; recomputation in a backward pass happens inside `apart` too.
_lengths: tuple[int, ...] = ()


@contextmanager
def apart(lengths: Sequence[int]) -> Iterator[None]:
    """For forward and backward of one packed row; `lengths` add up to the row. Empty: a usual batch."""
    global _lengths
    before, _lengths = _lengths, tuple(lengths)
    try:
        yield
    finally:
        _lengths = before


def register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """(batch, heads, length, size) each → (batch, length, heads, size), as Transformers wants it."""
    if not _lengths:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    parts = [
        sdpa_attention_forward(module, q, k, v, None, **options)[0]
        for q, k, v in zip(*(torch.split(tensor, list(_lengths), dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    return None if _lengths else sdpa_mask(*arguments, **options)
