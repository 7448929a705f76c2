"""Computes attention over a packed row on CUDA with PyTorch's variable-length flash attention.

`flash_calls` divides the row into calls. Only q, k and v as the layer computed them are stored for
the backward pass: keys of shared prefixes are gathered again. A sliding window is an argument of
the kernel. Attention sinks change the softmax denominator only, so the kernel's output is scaled,
and its backward pass receives the larger denominator.

The kernel's operators in ATen are called directly. `torch.nn.attention.varlen` wraps the same two,
but its signature changed with each of the last releases, and its backward pass accepts neither
another denominator nor keys that are gathered again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune_trainer.kernels import packed_row
from finetune_trainer.kernels.attention.chunked import sink_gradient
from finetune_trainer.kernels.attention.flash_calls import FlashCall, flash_calls
from finetune_trainer.kernels.sizes import supports_head_size


def supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns whether `attend` can compute attention for these tensors, of the shape (1, heads,
    length, size)."""
    size, dtype = query.shape[-1], query.dtype
    fits = size == key.shape[-1] == value.shape[-1] and supports_head_size(size)
    half = dtype in (torch.bfloat16, torch.float16) and dtype == key.dtype == value.dtype
    return query.device.type == "cuda" and half and fits and query.shape[0] == 1 and query.shape[1] % key.shape[1] == 0


@torch.library.custom_op("finetune::attend_flash", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Computes attention from (1, heads, length, size) to (1, length, heads, size).

    Also returns the logarithm of the softmax denominators, (heads, length) in float32. A token
    attends to the last `window` tokens of its example, itself included, or to all if it is 0.
    `sinks`, (heads,), are scores of a further key whose value is zero. Call it inside
    `packed_row.computing`; otherwise, it raises RuntimeError.
    """
    q, k, v = (_by_token(tensor) for tensor in (query, key, value))
    outs, sums = [], []
    for call in _calls(query):
        out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
            call.queries(q), call.keys(k), call.keys(v), call.query_borders, call.key_borders, call.longest_query,
            call.longest_key, 0.0, not window, False, scale=scale, **_window(window),
        )  # fmt: skip
        outs.append(out)
        sums.append(log_sum)
    out, log_sums = _joined(outs, 0), _joined(sums, 1)
    if sinks is not None:
        total = torch.logaddexp(log_sums, sinks.to(log_sums.dtype)[:, None])
        out = (out * (log_sums - total).exp().transpose(0, 1)[..., None]).to(out.dtype)
        log_sums = total
    return out[None], log_sums


@torch.library.custom_op("finetune::attend_flash_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, out: Tensor, log_sums: Tensor,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of query, key, value, and sinks, in their shapes; that of missing sinks
    is empty. `out` and `log_sums` are what `attend` returned."""
    q, k, v = (_by_token(tensor) for tensor in (query, key, value))
    d_out, calls = gradient[0].contiguous(), _calls(query)
    random = torch.zeros(2, dtype=torch.uint64, device=query.device)  # for dropout, which isn't used
    parts = []
    shape = k.shape if calls[0].gathered is not None else (0,)
    by_key, by_value = (torch.zeros(shape, dtype=log_sums.dtype, device=k.device) for _ in range(2))
    for call in calls:
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            call.queries(d_out), call.queries(q), call.keys(k), call.keys(v), call.queries(out[0]),
            log_sums[:, call.first : call.last].contiguous(), call.query_borders, call.key_borders,
            call.longest_query, call.longest_key, 0.0, not window, random, random.new_empty(0), scale=scale,
            **_window(window),
        )  # fmt: skip
        parts.append(dq)
        if call.gathered is None:
            by_key, by_value = dk, dv
        else:
            call.gathered.add(by_key, dk)
            call.gathered.add(by_value, dv)
    gradients = (tensor.to(query.dtype).transpose(0, 1)[None] for tensor in (_joined(parts, 0), by_key, by_value))
    if sinks is None:
        return (*gradients, query.new_empty(0))  # type: ignore[return-value]
    inner = (d_out.to(log_sums.dtype) * out[0]).sum(-1).transpose(0, 1)
    return (*gradients, sink_gradient(sinks, log_sums, inner))  # type: ignore[return-value]


def _calls(query: Tensor) -> tuple[FlashCall, ...]:
    row = packed_row.required()
    return row.once(("flash", query.device), lambda: flash_calls(row.layout, query.device))


def _window(window: int) -> dict[str, int]:
    """Returns how many tokens before and after its own position the kernel lets a query attend
    to."""
    return {"window_size_left": window - 1 if window else -1, "window_size_right": 0}


def _by_token(tensor: Tensor) -> Tensor:
    """Returns (1, heads, length, size) as (length, heads, size), whose last dimension the kernel
    needs to be contiguous."""
    tensor = tensor[0].transpose(0, 1)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _joined(parts: list[Tensor], dimension: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dimension)


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size), query.new_empty(heads, length, dtype=torch.float32)


@attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, out: Tensor, log_sums: Tensor,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_sinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    dq, dk, dv = (
        tensor.new_empty(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3]).transpose(1, 2)
        for tensor in (query, key, value)
    )
    return dq, dk, dv, d_sinks


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, sinks, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, out, log_sums = ctx.saved_tensors
    dq, dk, dv, d_sinks = attend_backward(gradient, query, key, value, sinks, out, log_sums, ctx.scale, ctx.window)
    return dq, dk, dv, None if sinks is None else d_sinks, None, None


attend.register_autograd(_backward, setup_context=_save_for_backward)
