"""Provides attention that keeps packed examples separate: a token attends only to what precedes it
in its own example.

It is registered with Transformers under NAME. `packed_row.computing` declares the row's layout;
without one, this is Transformers' own sdpa attention. Nothing is computed for pairs of tokens that
don't attend to each other, so a packed row costs as much as its examples. Layers that mix tokens in
another way (recurrent, sliding window) can't use it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune_trainer.kernels import attention_cpu, attention_cuda, attention_reference, packed_row

NAME = "finetune_documents"


def register() -> None:
    """Registers this attention with Transformers. Repeated calls change nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Computes attention from (batch, heads, length, size) to (batch, length, heads, size), as
    Transformers expects."""
    row = packed_row.current()
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    query, key, value = _in_one_dtype(query, key, value)
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    dropout = float(options.get("dropout") or 0.0)
    if not dropout and attention_cpu.supports(query, value):
        return attention_cpu.attend(query, key, value, scale)[0], None
    if not dropout and attention_cuda.supports(query, value):
        return attention_cuda.attend(query, key, value, scale)[0], None
    return attention_reference.attend(row.layout, query, key, value, scale, dropout=dropout), None


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Converts the tensors to autocast's number format, as PyTorch's own attention would, or
    without autocast to the format of the last tensor."""
    device = tensors[0].device.type
    autocast = torch.is_autocast_enabled(device) and tensors[0].dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else tensors[-1].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*arguments, **options) if packed_row.current() is None else None
