"""Counts the floating-point operations that training needs, for MFU. Pure.

The formula is that of docs/performance.md:

    a product with N weights   2 N per token forward, as much backward for its input, and as much
                               again if its weights are trained
    attention                  4 h forward and 8 h backward per layer and pair of tokens, where h is
                               its width

Only what has to be computed counts: no padding, no recomputation, and no output head for positions
without a label.
"""

from __future__ import annotations

from benchmarks.gpu.kit import Shape

# Dense bfloat16 with float32 accumulation, in FLOP/s, from NVIDIA's data sheets; the longest
# matching name is used.
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12, "A100": 312e12, "A10G": 70e12,
    "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX 5090": 210e12,
}  # fmt: skip


def peak(gpu: str) -> float | None:
    """Returns the peak FLOP/s of a card by its name, None if it isn't listed."""
    matching = [name for name in PEAKS if name in gpu]
    return PEAKS[max(matching, key=len)] if matching else None


def needed(shape: Shape, *, tokens: float, labels: float, pairs: float, full: bool) -> float:
    """Returns the FLOPs of a training step on `tokens` tokens.

    `labels` is the number of predicted positions, `pairs` that of token pairs that attend to each
    other. Adapters aren't counted: with rank 16 they are 0.2 to 1.5 % of an 8B model's FLOPs.
    """
    head_size = shape.hidden // shape.heads
    kv = shape.key_heads * head_size
    layer = shape.hidden * (2 * shape.hidden + 2 * kv + 3 * shape.intermediate)
    passes = 3 if full else 2
    products = 2 * passes * (shape.layers * layer * tokens + shape.hidden * shape.vocabulary * labels)
    return products + 12 * shape.hidden * shape.layers * pairs
