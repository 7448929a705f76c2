"""Computes attention over a packed row on CUDA with PyTorch's variable-length flash attention, in
one call per layer.

Each segment is a separate sequence. If a segment attends to a shared prefix, the keys of the prefix
are gathered in front of its own, and the kernel aligns its causal mask with the last key. The
gradient of this gathering is, for each key, the sum over all segments that attend to it. Only
16-bit tensors are supported.

Both directions are registered as operators that read the row's layout themselves: torch.compile
would otherwise compile a program for every layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune_trainer.kernels import packed_row
from finetune_trainer.kernels.cuda.flash_layout import CudaLayout


def supports(query: Tensor, value: Tensor) -> bool:
    """Returns whether `attend` can compute attention for these tensors."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and half and query.shape[0] == 1 and query.shape[-1] == value.shape[-1] <= 256


@torch.library.custom_op("finetune::attend_flash", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Computes attention from (1, heads, length, size) to (1, length, heads, size).

    Also returns the logarithm of the softmax denominators, (heads, length) in float32. Call it
    inside `packed_row.computing`; otherwise, it raises RuntimeError.
    """
    layout = _layout(query)
    q, k, v = _by_token(layout, query, key, value)
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, layout.query_borders, layout.key_borders, layout.longest_query, layout.longest_key, 0.0, True, False,
        scale=scale, window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    return out[None], log_sums


@torch.library.custom_op("finetune::attend_flash_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, in their shapes. `out` and `log_sums` are what
    `attend` returned."""
    layout = _layout(query)
    q, k, v = _by_token(layout, query, key, value)
    random = torch.zeros(2, dtype=torch.uint64, device=query.device)  # for dropout, which isn't used
    gradients = torch.ops.aten._flash_attention_backward(
        gradient[0].contiguous(), q, k, v, out[0], log_sums, layout.query_borders, layout.key_borders,
        layout.longest_query, layout.longest_key, 0.0, True, random, random.new_empty(0), scale=scale,
        window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    dq, dk, dv = gradients
    if layout.key_positions is not None:
        dk, dv = (
            torch.zeros(query.shape[2], *gathered.shape[1:], dtype=gathered.dtype, device=gathered.device).index_add_(
                0, layout.key_positions, gathered
            )
            for gathered in (dk, dv)
        )
    return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None]


def _layout(query: Tensor) -> CudaLayout:
    row = packed_row.current()
    if row is None:
        raise RuntimeError("attention over a packed row was called outside of packed_row.computing")
    return row.cuda(query.device)


def _by_token(layout: CudaLayout, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (1, heads, length, size) as (length, heads, size). The keys and values are those that
    each sequence attends to."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.key_positions is not None:
        k, v = k.index_select(0, layout.key_positions), v.index_select(0, layout.key_positions)
    return q, k, v


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size), query.new_empty(heads, length, dtype=torch.float32)


@attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    by_token = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return tuple(tensor.new_empty(tensor.shape).transpose(1, 2) for tensor in by_token)  # type: ignore[return-value]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_backward(gradient, *ctx.saved_tensors, ctx.scale), None


attend.register_autograd(_backward, setup_context=_save_for_backward)
