"""Attention that keeps packed examples apart: a token meets only what its own example says before it.

Registered with Transformers under NAME by `model`; `loss` says with `apart` how the row is laid out. Nothing is
computed for pairs of tokens that don't see each other, so a packed row costs what its examples cost. Without `apart`
it is Transformers' own sdpa attention. Not for layers that mix tokens elsewhere (recurrent, sliding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune_trainer import attention_cpu, attention_cuda, attention_plain
from finetune_trainer.layout import Layout

NAME = "finetune_documents"

# One thread computes one micro-batch at a time; recomputation in a backward pass happens inside `apart` too.
_row: _Row | None = None


@dataclass
class _Row:
    """A layout, and what the kernels make of it once."""

    layout: Layout
    on_cuda: attention_cuda.Arranged | None = None

    def cuda(self, device: torch.device) -> attention_cuda.Arranged:
        if self.on_cuda is None:
            self.on_cuda = attention_cuda.Arranged.of(self.layout, device)
        return self.on_cuda


@contextmanager
def apart(layout: Layout | None) -> Iterator[None]:
    """For forward and backward of one packed row. None: a usual batch."""
    global _row
    before, _row = _row, _Row(layout) if layout is not None else None
    try:
        with attention_cpu.arranged(layout):
            yield
    finally:
        _row = before


def register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """(batch, heads, length, size) each → (batch, length, heads, size), as Transformers wants it."""
    if _row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    query, key, value = _alike(query, key, value)
    asked = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if asked is None else float(asked)
    dropout = float(options.get("dropout") or 0.0)
    if not dropout and attention_cpu.serves(query, value):
        return attention_cpu.attend(query, key, value, scale)[0], None
    if not dropout and attention_cuda.serves(query, value):
        return attention_cuda.attend(_row.cuda(query.device), query, key, value, scale), None
    return attention_plain.attend(_row.layout, query, key, value, scale, dropout), None


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In one number format; under autocast in its own, as PyTorch's attention would do."""
    kind = tensors[0].device.type
    autocast = torch.is_autocast_enabled(kind) and tensors[0].dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else tensors[-1].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*arguments, **options) if _row is None else None
