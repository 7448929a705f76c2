"""Registers the fused kernels as PyTorch operators, so that fake tensors, torch.compile, activation
checkpointing and FSDP see one operation with a known backward pass.

On CUDA an operator is one Triton kernel; elsewhere it computes the same with plain operations. No
operator changes its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune_trainer.kernels.cuda import reference


def _kernels(tensor: Tensor) -> Any:
    if tensor.device.type != "cuda":
        return reference
    from finetune_trainer.kernels.cuda import launch

    return launch


@torch.library.custom_op("finetune::rms_norm", mutates_args=())
def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, shifted: bool) -> tuple[Tensor, Tensor]:
    """Computes RMSNorm over the last dimension (Zhang and Sennrich 2019). Also returns one over the
    root of each row's mean square, in float32.

    With `shifted`, the weight is relative to one, and the product is rounded once, as in Gemma.
    """
    return _kernels(hidden).rms_norm(hidden, None, weight, epsilon, shifted)[1:]  # type: ignore[no-any-return]


@rms_norm.register_fake
def _(hidden: Tensor, weight: Tensor, epsilon: float, shifted: bool) -> tuple[Tensor, Tensor]:
    return _fake_norm(hidden, hidden.dtype, weight, shifted)


@torch.library.custom_op("finetune::add_rms_norm", mutates_args=())
def add_rms_norm(
    hidden: Tensor, delta: Tensor, weight: Tensor, epsilon: float, shifted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `hidden` + `delta` of one shape, followed by what `rms_norm` returns for the sum."""
    return _kernels(hidden).rms_norm(hidden, delta, weight, epsilon, shifted)  # type: ignore[no-any-return]


@add_rms_norm.register_fake
def _(
    hidden: Tensor, delta: Tensor, weight: Tensor, epsilon: float, shifted: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(hidden.dtype, delta.dtype)
    return hidden.new_empty(hidden.shape, dtype=dtype), *_fake_norm(hidden, dtype, weight, shifted)


def _fake_norm(hidden: Tensor, dtype: torch.dtype, weight: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    out = dtype if shifted else torch.promote_types(dtype, weight.dtype)
    inverse = torch.float64 if dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape, dtype=out), hidden.new_empty(hidden.shape[:-1], dtype=inverse)


@torch.library.custom_op("finetune::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    slope: Tensor, beyond: Tensor | None, hidden: Tensor, weight: Tensor, inverse: Tensor, shifted: bool, trained: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the normalized tensor `hidden`, to which `beyond` is added, and of
    the weight, which is empty unless it is `trained`."""
    return _kernels(hidden).rms_norm_backward(  # type: ignore[no-any-return]
        slope, beyond, hidden, weight, inverse, shifted, trained
    )


@rms_norm_backward.register_fake
def _(
    slope: Tensor, beyond: Tensor | None, hidden: Tensor, weight: Tensor, inverse: Tensor, shifted: bool, trained: bool
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape if trained else 0)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, ctx.shifted = inputs
    ctx.trained = weight.requires_grad
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, output[1])


def _norm_gradients(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    by_hidden, by_weight = rms_norm_backward(slope, None, *ctx.saved_tensors, ctx.shifted, ctx.trained)
    return by_hidden, by_weight if ctx.trained else None, None, None


rms_norm.register_autograd(_norm_gradients, setup_context=_save_norm)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, delta, weight, _, ctx.shifted = inputs
    ctx.trained, ctx.dtypes = weight.requires_grad, (hidden.dtype, delta.dtype)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[0], weight, output[2])


def _sum_gradients(ctx: Any, beyond: Tensor, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradient, by_weight = rms_norm_backward(slope, beyond, *ctx.saved_tensors, ctx.shifted, ctx.trained)
    by_hidden, by_delta = (gradient.to(dtype) for dtype in ctx.dtypes)
    return by_hidden, by_delta, by_weight if ctx.trained else None, None, None


add_rms_norm.register_autograd(_sum_gradients, setup_context=_save_sum)


@torch.library.custom_op("finetune::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Computes silu(gate) x up, or gelu(gate) x up with its approximation by tanh (Shazeer 2020),
    of two tensors of one shape and number format."""
    return _kernels(gate).gated(gate, up, gelu)  # type: ignore[no-any-return]


@gated.register_fake
def _(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("finetune::gated_backward", mutates_args=())
def gated_backward(slope: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Returns the gradients of both factors of `gated`."""
    return _kernels(gate).gated_backward(slope, gate, up, gelu)  # type: ignore[no-any-return]


@gated_backward.register_fake
def _(slope: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.gelu = inputs
    ctx.save_for_backward(gate, up)


def _gated_gradients(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_backward(slope, *ctx.saved_tensors, ctx.gelu), None


gated.register_autograd(_gated_gradients, setup_context=_save_factors)


@torch.library.custom_op("finetune::rotary", mutates_args=())
def rotary(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Rotates heads, (batch, heads, length, size), by the angles of `cos` and `sin`, (batch or 1,
    length, size), as Llama does: the first half of a head with its second half (Su et al. 2021).

    With `backward`, it computes the gradient instead. In the result, the heads of a token are
    adjacent.
    """
    return _kernels(heads).rotary(heads, cos, sin, backward)  # type: ignore[no-any-return]


@rotary.register_fake
def _(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    batches, count, length, size = heads.shape
    return heads.new_empty((batches, length, count, size)).transpose(1, 2)


def _save_tables(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.backward_pass = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_gradients(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    return rotary(slope, *ctx.saved_tensors, not ctx.backward_pass), None, None, None


rotary.register_autograd(_rotary_gradients, setup_context=_save_tables)
