"""Counts the floating-point operations that training needs, and knows the peak of GPUs, for MFU.
Pure.

Model FLOPs utilization (Chowdhery et al. 2022, "PaLM", appendix B) is the share of a GPU's peak
that the necessary operations of a model use:

    MFU = tokens per second and GPU * FLOPs per token / peak FLOP/s

    a product with N weights   2 N per token forward, as much backward for its input, and as much
                               again if its weights are trained
    attention                  4 h forward and 8 h backward per layer and pair of tokens, where h is
                               its width

Only what has to be computed counts: no padding, no recomputation, and no output layer for positions
without a label. Adapters aren't counted; with rank 16 they are 0.2 to 1.5% of an 8B model's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Dense bfloat16 with float32 accumulation, in FLOP/s, from NVIDIA's data sheets; the longest
# matching name is used.
PEAKS = {
    "GH200": 989e12, "H200": 989e12, "H200 NVL": 835e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12,
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "A30": 165e12, "A40": 150e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX 5090": 210e12,
}  # fmt: skip
# What may surround the name of a GPU without making it another product: "RTX 4090 Laptop GPU" is
# one, "A10 12Q" is a share of a GPU, and so is a MIG slice.
_MAKERS = frozenset({"NVIDIA", "GeForce"})
_VARIANT = re.compile(r"SXM\d?|PCIE|PCIe|HBM\w+|\d+GB|3e")


def peak(gpu: str) -> float | None:
    """Returns the peak FLOP/s of a GPU by its name; None if it isn't listed, or is only a part."""
    parts = [word for word in gpu.replace("-", " ").split() if word not in _MAKERS]
    matching = [name for name in PEAKS if parts[: len(name.split())] == name.split()]
    if not matching:
        return None
    name = max(matching, key=len)
    return PEAKS[name] if all(_VARIANT.fullmatch(word) for word in parts[len(name.split()) :]) else None


@dataclass(frozen=True)
class Widths:
    """The numbers of a decoder that its FLOPs depend on.

    `matrices` is the number of values in the matrices of all layers, and `attention` the width of
    all query heads together.
    """

    matrices: int
    hidden: int
    vocabulary: int
    layers: int
    attention: int


def needed(widths: Widths, *, tokens: float, labels: float, pairs: float, full: bool) -> float:
    """Returns the FLOPs of training on `tokens` tokens.

    `labels` is the number of predicted positions, `pairs` that of token pairs that attend to each
    other. With `full`, all weights are trained; otherwise, adapters.
    """
    passes = 3 if full else 2
    products = 2 * passes * (widths.matrices * tokens + widths.hidden * widths.vocabulary * labels)
    return products + 12 * widths.attention * widths.layers * pairs
