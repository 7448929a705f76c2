"""Contains the Triton kernel for the softmax of the output head. This module imports Triton, which
needs Linux; `softmax` calls the kernel."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
"""Logits that a program computes at a time."""

WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def softmax_gradient(logits, counts, log_sums, columns, WRITE: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes the logarithm of the sum of exponentials of a row of logits, in float32, and with
    WRITE replaces the row with its softmax times the row's count.

    Every lane keeps a maximum and a sum of its own, so the loop needs no reduction. Milakov and
    Gimelshein (2018) describe the running sum.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * columns
    column = tl.arange(0, B)
    highest = tl.full((B,), -1e30, tl.float32)
    sums = tl.zeros((B,), tl.float32)
    for start in range(0, columns, B):
        inside = start + column < columns
        x = tl.load(begin + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        before = highest
        highest = tl.maximum(before, x)
        sums = sums * tl.exp(before - highest) + tl.exp(x - highest)
    top = tl.max(highest, 0)
    log_sum = top + tl.log(tl.sum(sums * tl.exp(highest - top), 0))
    tl.store(log_sums + row, log_sum)
    if WRITE:
        count = tl.load(counts + row)
        for start in range(0, columns, B):
            inside = start + column < columns
            x = tl.load(begin + start + column, mask=inside, other=0.0).to(tl.float32)
            p = tl.where(count == 0.0, 0.0, count * tl.exp(x - log_sum))
            tl.store(begin + start + column, p.to(logits.dtype.element_ty), mask=inside)
