"""Estimates how long an H100 SXM computes a kernel. Pure.

The longest of three times: that of its operations at the rate of large matrix products, that of its
bytes at the bandwidth of large copies, and that of a launch.
"""

from __future__ import annotations

import torch
from benchmarks.gpu.roofline.kernels import Kernel

from finetune_trainer.model.flops import PEAKS

PEAK = PEAKS["H100"]
"""FLOP/s of dense bfloat16 products, from NVIDIA's data sheet. MFU is relative to it."""

SUSTAINED = 700e12
"""FLOP/s that large bfloat16 products reach: 71% of the peak. Power and clocks limit them; large
products of cuBLAS were measured at 600 to 800 TFLOP/s on cards of this kind."""

FLOAT32 = 55e12
"""FLOP/s of float32 products without TF32: about 80% of the data sheet's 67 TFLOP/s."""

BANDWIDTH = 3.0e12
"""Bytes per second of large copies: 90% of the data sheet's 3.35 TB/s of HBM3."""

LAUNCH = 2.5e-6
"""Seconds of the shortest kernel in a queue that is never empty."""

ATTENTION_FORWARD, ATTENTION_BACKWARD = 0.55, 0.43
"""The rate of FlashAttention-2 on an H100 relative to that of large products: about 390 and 300
TFLOP/s for heads of 128 (Dao 2023; Shah et al. 2024, figures 5 and 6)."""


def seconds(kernel: Kernel) -> float:
    """Returns how long a kernel takes."""
    rate = SUSTAINED
    if kernel.kind == "attention":
        rate *= ATTENTION_BACKWARD if kernel.backward else ATTENTION_FORWARD
    elif kernel.dtype in (torch.float32, torch.float64):
        rate = FLOAT32
    return max(kernel.flops / rate, kernel.bytes / BANDWIDTH, LAUNCH)
