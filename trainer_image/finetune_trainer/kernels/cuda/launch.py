"""Calls the Triton kernels.

Each function takes and returns what the operator of the same name in `elementwise` does. With
TRITON_INTERPRET=1, which must be set before Triton is imported, they run on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from finetune_trainer.kernels.cuda import triton_kernels as kernels

_TILE = 4096  # values that a program computes at a time
_MAX_PARTIAL_SUMS = 512
_BLOCK = 2048


def rms_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, shifted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (the sum, its norm, the inverse roots). Without `delta`, the sum is empty."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    delta = hidden if delta is None else delta.contiguous()
    add = delta is not hidden
    total = torch.empty_like(hidden, dtype=torch.promote_types(hidden.dtype, delta.dtype)) if add else hidden
    out = torch.empty_like(hidden, dtype=total.dtype if shifted else torch.promote_types(total.dtype, weight.dtype))
    rows, columns = _rows(hidden)
    inverse = torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device)
    tile = _tile(columns)
    if rows:
        grid = (triton.cdiv(rows, tile["R"]),)
        kernels.norm_forward[grid](
            hidden, delta, weight, total, out, inverse, rows, columns, epsilon, ADD=add, SHIFTED=shifted, **tile
        )
    return total if add else hidden.new_empty(0), out, inverse


def rms_norm_backward(
    slope: Tensor, beyond: Tensor | None, hidden: Tensor, weight: Tensor, inverse: Tensor, shifted: bool, trained: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the normalized tensor and of the weight, which is empty unless it is
    `trained`."""
    slope, hidden, weight = slope.contiguous(), hidden.contiguous(), weight.contiguous()
    rows, columns = _rows(hidden)
    by_hidden = torch.empty_like(hidden)
    tile = _tile(columns)
    blocks = triton.cdiv(rows, tile["R"])
    programs = min(blocks, _MAX_PARTIAL_SUMS) if trained else blocks
    partial = hidden.new_empty((programs, columns) if trained else 0, dtype=torch.float32)
    if rows:
        kernels.norm_backward[(programs,)](
            slope, slope if beyond is None else beyond.contiguous(), hidden, weight, inverse, by_hidden, partial,
            rows, columns, blocks, programs, ADD=beyond is not None, SHIFTED=shifted, WEIGHT=trained, **tile,
        )  # fmt: skip
    return by_hidden, partial.sum(0).to(weight.dtype) if trained else partial


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Returns the activated gate times `up`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), _BLOCK),)
        kernels.gated_forward[grid](gate, up, out, gate.numel(), GELU=gelu, B=_BLOCK, num_warps=8)
    return out


def gated_backward(slope: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and `up`."""
    slope, gate, up = slope.contiguous(), gate.contiguous(), up.contiguous()
    by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), _BLOCK),)
        kernels.gated_backward[grid](
            slope, gate, up, by_gate, by_up, gate.numel(), GELU=gelu, B=_BLOCK, num_warps=8
        )  # fmt: skip
    return by_gate, by_up


def rotary(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Returns the rotated heads, (batch, heads, length, size), with a token's heads adjacent."""
    heads = heads.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty_like(heads)
    cos, sin = cos.contiguous(), sin.contiguous()
    batches, head_count, length, size = heads.shape
    if heads.numel():
        kernels.rotate[(batches * length,)](
            heads, out, cos, sin, length, head_count, size // 2, heads.stride(0), heads.stride(1), heads.stride(2),
            cos.stride(0) if cos.shape[0] > 1 else 0, BACKWARD=backward, H=triton.next_power_of_2(head_count),
            D=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return out


def _rows(tensor: Tensor) -> tuple[int, int]:
    columns = tensor.shape[-1]
    return tensor.numel() // max(1, columns), columns


def _tile(columns: int) -> dict[str, Any]:
    """Returns the shape of a tile, and the number of warps that compute it."""
    width = triton.next_power_of_2(columns)
    warps = 8 if width <= _TILE else 32
    return {"R": max(1, _TILE // width), "C": width, "num_warps": warps}
