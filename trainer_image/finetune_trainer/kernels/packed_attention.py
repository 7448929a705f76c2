"""Provides attention that keeps packed examples separate: a token attends only to what precedes it
in its own example, and in layers with a sliding window only to the last tokens of that.

It is registered with Transformers under two names. `packed_row.computing` declares the row's
layout; without one, the first name stands for Transformers' own sdpa attention, and the second for
the eager attention of the model's own module, for families whose scores sdpa can't compute
(soft-capped scores, attention sinks). Nothing is computed for pairs of tokens in different
examples, so a packed row costs as much as its examples. Layers that mix tokens in another way
(recurrent, chunked) can't use it.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from finetune_trainer.kernels import attention_cpu, attention_cuda, attention_reference, packed_row
from finetune_trainer.kernels.attention import chunked, head_exchange
from finetune_trainer.kernels.packed_row import CurrentRow

NAME = "finetune_documents"
EAGER_NAME = "finetune_documents_eager"


def register() -> None:
    """Registers this attention with Transformers. Repeated calls change nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    AttentionInterface.register(EAGER_NAME, _attention_or_eager)
    AttentionMaskInterface.register(EAGER_NAME, _mask_or_eager)


def name_for(model_class: type) -> str:
    """Returns the name for models of this class, or an empty string if their attention can't be
    replaced: some families choose among classes of their own instead of Transformers' functions."""
    if not hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return ""
    if getattr(model_class, "_supports_sdpa", True):
        return NAME
    replaceable = getattr(model_class, "_supports_attention_backend", False)
    return EAGER_NAME if replaceable and _eager(model_class) is not None else ""


def _eager(cls: type) -> Any:
    """Returns the eager attention that the module of a class defines, or None."""
    return vars(sys.modules[cls.__module__]).get("eager_attention_forward")


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Computes attention from (batch, heads, length, size) to (batch, length, heads, size), as
    Transformers expects."""
    row = packed_row.current()
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    return _packed(row, query, key, value, options), None


def _attention_or_eager(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    row = packed_row.current()
    if row is None:
        return _eager(type(module))(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    return _packed(row, query, key, value, options), None


def _packed(row: CurrentRow, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Computes attention over the whole row, for all heads, or for this rank's share of them if
    ranks share the row."""
    part, heads, sinks = row.sequence, query.shape[1], options.get("s_aux")
    query, key, value = _in_one_dtype(query, key, value)
    if not part:
        return _whole_rows(row, query, key, value, options)
    if sinks is not None:
        options = {**options, "s_aux": sinks[head_exchange.own_heads(part, heads)]}
    query, key, value = (head_exchange.to_own_heads(part, heads, tensor) for tensor in (query, key, value))
    return head_exchange.to_own_tokens(part, _whole_rows(row, query, key, value, options))


def _whole_rows(row: CurrentRow, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Computes attention with the fastest kernel that supports these tensors and options."""
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    dropout = float(options.get("dropout") or 0.0)
    softcap, sinks = float(options.get("softcap") or 0.0), options.get("s_aux")
    window = int(options.get("sliding_window") or 0)
    if window and window >= row.longest_context:
        window = 0
    if dropout:
        return attention_reference.attend(
            row.layout, query, key, value, scale, dropout=dropout, sinks=sinks, window=window, softcap=softcap
        )
    if not softcap and attention_cuda.supports(query, key, value):
        return cast(Tensor, attention_cuda.attend(query, key, value, sinks, scale, window)[0])
    if window or softcap or sinks is not None or query.device.type == "cuda":
        return cast(Tensor, chunked.attend(query, key, value, sinks, scale, window, softcap)[0])
    if attention_cpu.supports(query, value):
        return cast(Tensor, attention_cpu.attend(query, key, value, scale)[0])
    return attention_reference.attend(row.layout, query, key, value, scale)


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Converts the tensors to autocast's number format, as PyTorch's own attention would, or
    without autocast to the format of the last tensor."""
    device = tensors[0].device.type
    autocast = torch.is_autocast_enabled(device) and tensors[0].dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else tensors[-1].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*arguments, **options) if packed_row.current() is None else None


def _mask_or_eager(*arguments: Any, **options: Any) -> Tensor | None:
    return eager_mask(*arguments, **options) if packed_row.current() is None else None
