"""Replaces frozen norms and gated products (SwiGLU) with versions that save less for the backward
pass.

Eager PyTorch saves the result of every step of a formula. Here, a norm saves its input and one
number per row, and a gated product saves its two factors. The backward pass recomputes the rest,
which costs no more than writing it to memory and reading it back. Forward passes round as the
model's own do. Every replacement is tested first, and a module whose replacement computes anything
else stays as it is. Compiled layers and layers whose weights are sharded aren't supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_ROWS = 3
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def replace_modules(model: nn.Module) -> tuple[int, int]:
    """Replaces all modules that can be replaced. Returns how many norms and how many gated products
    were replaced."""
    norms = [module for module in model.modules() if _is_norm(module)]
    gated = [module for module in model.modules() if _is_gated(module)]
    return sum(map(_replace_norm, norms)), sum(map(_replace_product, gated))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    frozen = isinstance(weight, Tensor) and weight.dim() == 1 and not weight.requires_grad
    return frozen and type(module).__name__.endswith("RMSNorm") and _epsilon(module) > 0


def _epsilon(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0)


def _is_gated(module: Any) -> bool:
    complete = all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED)
    quantized = not all(weight.is_floating_point() for weight in module.parameters())
    return complete and not quantized


def _replace_norm(module: Any) -> bool:
    weight, epsilon = module.weight, _epsilon(module)

    def forward(hidden: Tensor) -> Tensor:
        return _Norm.apply(hidden, weight, epsilon)  # type: ignore[no-any-return, no-untyped-call]

    samples = (_wave(_ROWS, len(weight), like=weight),)
    return _replace_if_equal(module, forward, module.forward, forward, samples)


def _replace_product(module: Any) -> bool:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return _Gated.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]

    def forward(hidden: Tensor) -> Tensor:
        return module.down_proj(product(module.gate_proj(hidden), module.up_proj(hidden)))  # type: ignore[no-any-return]

    weight = next(module.parameters())
    hidden = _wave(_ROWS, module.gate_proj.in_features, like=weight)
    original, training = module.forward, module.training
    module.eval()
    half = (
        weight.dtype if weight.dtype.itemsize < 4 else None
    )  # float32 adapters of a half-precision base need autocast
    with torch.no_grad(), torch.autocast(weight.device.type, half, enabled=half is not None):
        same = torch.equal(original(hidden), forward(hidden))
    module.train(training)
    samples = _wave(_ROWS, 8, like=weight), _wave(_ROWS, 9, like=weight)[:, 1:]
    return same and _replace_if_equal(module, forward, lambda gate, up: module.act_fn(gate) * up, product, samples)


def _replace_if_equal(
    module: Any, forward: Callable[..., Tensor], theirs: Callable[..., Tensor], ours: Callable[..., Tensor],
    samples: tuple[Tensor, ...],
) -> bool:  # fmt: skip
    """Makes `forward` the module's own if `ours` computes the same values as `theirs`, and the same
    gradients up to rounding. Returns whether it does."""
    expected, computed = (_with_gradients(function, samples) for function in (theirs, ours))
    equal = torch.equal(expected[0], computed[0]) and all(
        torch.allclose(a, b, rtol=2e-2 if b.dtype.itemsize < 4 else 1e-4, atol=2e-2 if b.dtype.itemsize < 4 else 1e-5)
        for a, b in zip(expected[1:], computed[1:], strict=True)
    )
    if equal:
        module.forward = forward
    return equal


def _wave(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """Returns numbers between -2 and 2 that are the same in every run."""
    wave = torch.arange(rows * columns, device=like.device, dtype=torch.float64).mul_(1.7).sin_().mul_(2)
    return wave.view(rows, columns).to(like.dtype)


def _with_gradients(function: Callable[..., Tensor], samples: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the function's value, followed by the gradients with respect to its arguments."""
    with torch.enable_grad():
        inputs = [tensor.clone().requires_grad_() for tensor in samples]
        out = function(*inputs)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


class _Norm(torch.autograd.Function):
    """Computes RMSNorm over the last dimension: x / sqrt(mean of x² + epsilon), times a weight
    (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = hidden.to(torch.float32)
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return weight * (wide * inverse).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight, inverse = ctx.saved_tensors
        wide = hidden.to(torch.float32)
        slope = gradients[0].to(torch.float32) * weight
        along = (slope * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-hidden.shape[-1])
        return slope.mul_(inverse).addcmul_(wide, along).to(hidden.dtype), None, None


class _Gated(torch.autograd.Function):
    """Computes silu(gate) x up, as in Transformers' SwiGLU layers (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (slope,) = gradients
        by_gate = torch.ops.aten.silu_backward(slope * up, gate)
        return by_gate, functional.silu(gate).mul_(slope)
