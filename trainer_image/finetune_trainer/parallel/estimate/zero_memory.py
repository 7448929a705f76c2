"""What DeepSpeed needs besides a rank's share of weights, gradients and moments, in bytes.

This module is pure and doesn't import torch. Decision 0019 compares it with DeepSpeed's own engine.
"""

from __future__ import annotations

from finetune_trainer.parallel.limits import ZERO_BUCKET, ZERO_LIVE_PARAMETERS


def gradients_of_stage_2(trained: int, ranks: int, largest_tensor: int) -> int:
    """Returns the bytes of the gradients that a rank keeps from one micro-batch to the next: those
    of all tensors that its part of the weights touches, as a whole."""
    return 4 * min(trained, trained // ranks + largest_tensor)


def gathered_by_stage_3(parameters: int, largest: int, stored: int) -> int:
    """Returns the bytes of the weights that are gathered at a time, and of the buffer of gradients,
    which exists all the time. `largest` is the number of values that are gathered together."""
    return min(parameters, ZERO_LIVE_PARAMETERS + largest) * stored + 4 * ZERO_BUCKET


def casts_in_stage_3(layer: int, count: int, head: int) -> int:
    """Returns the bytes of the copies of trained weights in bfloat16 that are stored from the
    forward pass to the backward pass, since each product stores its own.

    `layer` is the number of values of a layer, and `count` layers aren't recomputed. `head` is that
    of the output layer, whose copy is freed before the backward pass of the layers.
    """
    return max(2 * layer * count, 2 * head)


def buffers(stage: int, trained: int) -> int:
    """Returns the bytes of the messages with gradients in float32. Stage 2 copies a full bucket to
    send it."""
    match stage:
        case 1:
            return 4 * min(trained, ZERO_BUCKET)
        case 2:
            return 2 * 4 * ZERO_BUCKET
        case _:
            return 0
