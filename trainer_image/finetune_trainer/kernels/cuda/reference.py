"""Computes with plain operations what the Triton kernels compute, on any device.

The kernels are compared with it, and it stands in for them where there is no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GELU = 1.5957691216057308  # sqrt(8 / pi)
_CUBE = 0.044715


def rms_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, shifted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (the sum, its norm, the inverse roots). Without `delta`, the sum is empty."""
    total = hidden if delta is None else hidden + delta
    x = _wide(total)
    inverse = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    scaled = x * inverse
    out = (scaled * (1 + _wide(weight))).to(total.dtype) if shifted else scaled.to(total.dtype) * weight
    return hidden.new_empty(0) if delta is None else total, out, inverse.squeeze(-1)


def rms_norm_backward(
    slope: Tensor, beyond: Tensor | None, hidden: Tensor, weight: Tensor, inverse: Tensor, shifted: bool, trained: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the normalized tensor and of the weight, which is empty unless it is
    `trained`."""
    g, root = _wide(slope), inverse[..., None]
    x = _wide(hidden) * root
    scaled = g * (_wide(weight) + shifted)
    gradient = (scaled - x * (scaled * x).mean(-1, keepdim=True)) * root
    if beyond is not None:
        gradient = gradient + beyond
    if not trained:
        return gradient.to(hidden.dtype), g.new_empty(0)
    by_weight = torch.where(g == 0, 0, g * x).flatten(0, -2).sum(0)
    return gradient.to(hidden.dtype), by_weight.to(weight.dtype)


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Returns the activated gate times `up`."""
    x = _wide(gate)
    return (x * _factor(x, gelu)).to(gate.dtype) * up


def gated_backward(slope: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and `up`."""
    g, x, y = _wide(slope), _wide(gate), _wide(up)
    factor = _factor(x, gelu)
    derivative = factor * (1 + x * (1 - factor))
    if gelu:
        near = x.clamp(-16, 16)
        derivative = factor + near * factor * (1 - factor) * _GELU * (1 + 3 * _CUBE * near.square())
    return (g * y * derivative).to(gate.dtype), (g * x * factor).to(up.dtype)


def rotary(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Returns the rotated heads, (batch, heads, length, size), with a token's heads adjacent."""
    first, second = _wide(heads.transpose(1, 2)).chunk(2, -1)
    (cos_first, cos_second), (sin_first, sin_second) = (_wide(table)[:, :, None].chunk(2, -1) for table in (cos, sin))
    if backward:
        parts = first * cos_first + second * sin_second, second * cos_second - first * sin_first
    else:
        parts = first * cos_first - second * sin_first, second * cos_second + first * sin_second
    return torch.cat(parts, -1).to(heads.dtype).transpose(1, 2)


def _factor(x: Tensor, gelu: bool) -> Tensor:
    """Returns what the activation multiplies its input by."""
    return torch.sigmoid(_GELU * x * (1 + _CUBE * x * x) if gelu else x)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
