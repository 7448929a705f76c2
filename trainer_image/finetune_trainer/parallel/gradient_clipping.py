"""Clips gradients by their global norm. `ddp` and `fsdp` do so after the gradients of the ranks
have been averaged.

DeepSpeed clips inside its own optimizer step, according to `gradient_clipping` in its configuration
(`deepspeed_config`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def clip_by_global_norm(
    parameters: Sequence[Any], max_norm: float, reduce_norm: Callable[[Tensor], Tensor] = lambda norm: norm
) -> float:
    """Scales all gradients so that their global norm is at most `max_norm`, and returns the norm
    before clipping.

    A `max_norm` of 0 disables clipping. Gradients whose norm isn't finite are left unchanged.
    `reduce_norm` turns the norm of this rank's gradients into that of all ranks, on the device of
    the gradients.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    global_norm = reduce_norm(torch.nn.utils.get_total_norm(gradients))
    norm = float(global_norm)
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, global_norm)
    return norm
