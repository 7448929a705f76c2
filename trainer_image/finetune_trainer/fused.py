"""Frozen norms and gated products (SwiGLU) that keep less for the backward pass, in the place of a model's own.

Eager PyTorch keeps every step of a formula. Here a norm keeps its input and one number a row, a gated product its two
factors; what else the backward pass needs it computes again, which costs no more than writing it out and reading it
back. Forward passes round as the models' own do. Every module is tried first: one that doesn't compute the same stays
as it is. Called by `assembly` for layers that are neither compiled nor split over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_ROWS = 3
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def put_in(model: nn.Module) -> tuple[int, int]:
    """How many norms, and how many gated products, were replaced."""
    norms = [module for module in model.modules() if _is_norm(module)]
    gated = [module for module in model.modules() if _is_gated(module)]
    return sum(map(_norm_replaced, norms)), sum(map(_product_replaced, gated))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and weight.dim() == 1 and not weight.requires_grad
    return plain and type(module).__name__.endswith("RMSNorm") and _epsilon(module) > 0


def _epsilon(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0)


def _is_gated(module: Any) -> bool:
    whole = all(isinstance(getattr(module, part, None), nn.Module) for part in _GATED)
    return whole and all(weight.is_floating_point() for weight in module.parameters())  # and not quantised


def _norm_replaced(module: Any) -> bool:
    weight, epsilon = module.weight, _epsilon(module)

    def forward(hidden: Tensor) -> Tensor:
        return _Norm.apply(hidden, weight, epsilon)  # type: ignore[no-any-return, no-untyped-call]

    given = (_wave(_ROWS, len(weight), like=weight),)
    return _if_alike(module, forward, module.forward, forward, given)


def _product_replaced(module: Any) -> bool:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return _Gated.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]

    def forward(hidden: Tensor) -> Tensor:
        return module.down_proj(product(module.gate_proj(hidden), module.up_proj(hidden)))  # type: ignore[no-any-return]

    weight = next(module.parameters())
    hidden = _wave(_ROWS, module.gate_proj.in_features, like=weight)
    was, training = module.forward, module.training
    module.eval()
    half = weight.dtype if weight.dtype.itemsize < 4 else None  # adapters of float32 beside it work under autocast only
    with torch.no_grad(), torch.autocast(weight.device.type, half, enabled=half is not None):
        same = torch.equal(was(hidden), forward(hidden))
    module.train(training)
    given = _wave(_ROWS, 8, like=weight), _wave(_ROWS, 9, like=weight)[:, 1:]
    return same and _if_alike(module, forward, lambda gate, up: module.act_fn(gate) * up, product, given)


def _if_alike(
    module: Any, forward: Callable[..., Tensor], theirs: Callable[..., Tensor], ours: Callable[..., Tensor],
    given: tuple[Tensor, ...],
) -> bool:  # fmt: skip
    """Puts `forward` in if values are the same and gradients are, to rounding."""
    expected, found = (_with_gradients(way, given) for way in (theirs, ours))
    alike = torch.equal(expected[0], found[0]) and all(
        torch.allclose(a, b, rtol=2e-2 if b.dtype.itemsize < 4 else 1e-4, atol=2e-2 if b.dtype.itemsize < 4 else 1e-5)
        for a, b in zip(expected[1:], found[1:], strict=True)
    )
    if alike:
        module.forward = forward
    return alike


def _wave(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """Numbers between -2 and 2, the same every time."""
    wave = torch.arange(rows * columns, device=like.device, dtype=torch.float64).mul_(1.7).sin_().mul_(2)
    return wave.view(rows, columns).to(like.dtype)


def _with_gradients(way: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.enable_grad():
        inputs = [tensor.clone().requires_grad_() for tensor in given]
        out = way(*inputs)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


class _Norm(torch.autograd.Function):
    """x / sqrt(mean of x² + epsilon) by row, times a weight (Zhang and Sennrich 2019); rows are the last dimension."""

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
    """silu(gate) x up, as Transformers' SwiGLU layers have it (Shazeer 2020)."""

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
