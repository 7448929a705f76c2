"""Contains the Triton kernels for what a layer computes between its matrix products.

All of them compute in float32 and read and write each tensor once. A row never affects another one,
except in the gradient of a weight, which skips rows whose gradient is zero. This module imports
Triton, which needs Linux; `launch` calls the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    hidden, delta, weight, total, out, inverse, rows, columns, epsilon,
    ADD: tl.constexpr, SHIFTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """RMSNorm of `hidden`, or with ADD of `hidden` + `delta`, which is written to `total`."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    dtype = hidden.dtype.element_ty
    if ADD:
        dtype = total.dtype.element_ty
        x += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(total + place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(x * x, 1) / columns + epsilon)
    tl.store(inverse + row, root, mask=row < rows)
    scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    x = x * root[:, None]
    if SHIFTED:
        y = x * (1.0 + scale)[None, :]
    else:
        y = x.to(dtype).to(tl.float32) * scale[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    slope, beyond, hidden, weight, inverse, by_hidden, by_weight, rows, columns, blocks, programs,
    ADD: tl.constexpr, SHIFTED: tl.constexpr, WEIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of `norm_forward`: of its input, to which ADD adds `beyond`, and with WEIGHT of the
    weight, as one partial sum per program."""
    program = tl.program_id(0)
    column = tl.arange(0, C)
    scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    if SHIFTED:
        scale += 1.0
    sums = tl.zeros((C,), dtype=tl.float32)
    for block in range(program, blocks, programs):
        row = tl.cast(block, tl.int64) * R + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row[:, None] * columns + column[None, :]
        g = tl.load(slope + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        root = tl.load(inverse + row, mask=row < rows, other=0.0)
        x = x * root[:, None]
        scaled = g * scale[None, :]
        along = tl.sum(scaled * x, 1) / columns
        gradient = (scaled - x * along[:, None]) * root[:, None]
        if ADD:
            gradient += tl.load(beyond + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(by_hidden + place, gradient.to(by_hidden.dtype.element_ty), mask=inside)
        if WEIGHT:
            sums += tl.sum(tl.where(g == 0.0, 0.0, g * x), 0)
    if WEIGHT:
        tl.store(by_weight + program.to(tl.int64) * columns + column, sums, mask=column < columns)


@triton.jit
def _gelu_factor(x, sign=1.0):
    """The factor of x in GELU's approximation by tanh, (1 + tanh z) / 2 = sigmoid(2z), or one minus
    it if `sign` is -1."""
    return tl.sigmoid(sign * 1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def gated_forward(gate, up, out, size, GELU: tl.constexpr, B: tl.constexpr):
    """silu(gate) x up, or gelu(gate) x up with GELU's approximation by tanh."""
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = place < size
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        active = x * _gelu_factor(x)
    else:
        active = x * tl.sigmoid(x)
    active = active.to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + place, (active * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(slope, gate, up, by_gate, by_up, size, GELU: tl.constexpr, B: tl.constexpr):
    """Gradients of `gated_forward`."""
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = place < size
    g = tl.load(slope + place, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        factor, rest = _gelu_factor(x), _gelu_factor(x, -1.0)
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)  # beyond, the factor is constant
        bend = factor * rest * 1.5957691216057308 * (1.0 + 3 * 0.044715 * near * near)
        derivative = factor + near * bend
    else:
        factor = tl.sigmoid(x)
        derivative = factor * (1.0 + x * tl.sigmoid(-x))
    tl.store(by_gate + place, (g * y * derivative).to(by_gate.dtype.element_ty), mask=inside)
    tl.store(by_up + place, (g * x * factor).to(by_up.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    heads, out, cos, sin, length, head_count, half, batch_stride, head_stride, token_stride, table_stride,
    BACKWARD: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of all heads of one token, or its gradient. `half` is half of a head's size,
    and a head's values are adjacent."""
    batch, token = tl.program_id(0).to(tl.int64) // length, tl.program_id(0).to(tl.int64) % length
    head, column = tl.arange(0, H), tl.arange(0, D)
    here = column < half
    table = batch * table_stride + token * 2 * half + column
    cos_first = tl.load(cos + table, mask=here, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + table + half, mask=here, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + table, mask=here, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + table + half, mask=here, other=0.0).to(tl.float32)[None, :]
    inside = (head < head_count)[:, None] & here[None, :]
    place = batch * batch_stride + head[:, None] * head_stride + token * token_stride + column[None, :]
    first = tl.load(heads + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + place + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        new_first = first * cos_first + second * sin_second
        new_second = second * cos_second - first * sin_first
    else:
        new_first = first * cos_first - second * sin_first
        new_second = second * cos_second + first * sin_second
    tl.store(out + place, new_first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + half, new_second.to(out.dtype.element_ty), mask=inside)
