"""Counts the floating-point operations of the check's models by the trainer's formula. Pure."""

from __future__ import annotations

from benchmarks.gpu.kit import Shape

from finetune_trainer.model import flops

peak = flops.peak


def needed(shape: Shape, *, tokens: float, labels: float, pairs: float, full: bool) -> float:
    """Returns the FLOPs of a training step on `tokens` tokens.

    `labels` is the number of predicted positions, `pairs` that of token pairs that attend to each
    other. Adapters aren't counted: with rank 16 they are 0.2 to 1.5 % of an 8B model's FLOPs.
    """
    head_size = shape.hidden // shape.heads
    kv = shape.key_heads * head_size
    layer = shape.hidden * (2 * shape.hidden + 2 * kv + 3 * shape.intermediate)
    widths = flops.Widths(shape.layers * layer, shape.hidden, shape.vocabulary, shape.layers, shape.hidden)
    return flops.needed(widths, tokens=tokens, labels=labels, pairs=pairs, full=full)
