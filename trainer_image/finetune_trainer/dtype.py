"""The number format of the base model: what the user says, or what this hardware is fast at. Called once by rank 0."""

from __future__ import annotations

import time

import torch

# bfloat16 loses digits, so it has to be worth it.
_WORTH = 1.3
_SHAPE = (256, 1024, 1024)


def choose(asked: str, device: torch.device) -> tuple[str, str]:
    """(float32 or bfloat16, reason). Probes with a small matrix product (about 0.1 s on a CPU)."""
    if asked != "auto":
        return asked, "model.dtype says so"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU computes in bfloat16"
        return "float32", "this GPU has no bfloat16"
    full, half = gflops(torch.float32), gflops(torch.bfloat16)
    figures = f"this CPU reaches {full:.0f} GFLOP/s in float32 and {half:.0f} in bfloat16"
    return ("bfloat16" if half > _WORTH * full else "float32"), figures


def gflops(dtype: torch.dtype, seconds: float = 0.04) -> float:
    """What a matrix product reaches on this CPU."""
    rows, inner, columns = _SHAPE
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    torch.mm(left, right)
    began, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - began < seconds:
        torch.mm(left, right)
        runs += 1
    return 2 * rows * inner * columns * runs / (time.perf_counter() - began) / 1e9
