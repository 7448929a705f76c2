"""The learning rate as a closed form of the step. Pure.

The loop writes it into the optimizer's groups at every step, so there is no scheduler state that
could be lost with a checkpoint or stepped too often.

With n the step (1 … N), W = ceil(warm-up ratio * N) steps of warm-up, F the floor and p = (n - 1 -
W) / (N - W):

    warm-up, n <= W   n / (W + 1)
    constant          1
    linear            F + (1 - F) (1 - p)
    cosine            F + (1 - F) (1 + cos(pi p)) / 2
    wsd               1, then over the last D = ceil(decay ratio * N) steps F + (1 - F) (1 -
    sqrt(q)),
                      q = (n - 1 - (N - D)) / D
    inverse_sqrt      sqrt(T / (n - 1 - W + T)), T = W or, without warm-up, 10,000

times the peak. After warm-up they equal Transformers' schedules at every step (wsd: with decay
"1-sqrt"). During warm-up Transformers uses (n - 1) / W, so its first step changes nothing; here no
step is wasted at either end.
"""

from __future__ import annotations

import math

from finetune_api.resource import TrainingSpec

_TIMESCALE = 10_000  # steps; of inverse_sqrt without warm-up


def learning_rate(step: int, total: int, recipe: TrainingSpec) -> float:
    """The learning rate of optimizer step `step`, from 1 to `total`."""
    warmup = min(math.ceil(recipe.warmup_ratio * total), total - 1)
    if step <= warmup:
        return recipe.learning_rate * step / (warmup + 1)
    return recipe.learning_rate * _share(step - 1 - warmup, total - warmup, total, recipe)


def _share(done: int, steps: int, total: int, recipe: TrainingSpec) -> float:
    """The share of the peak after `done` of the `steps` that follow warm-up."""
    floor = recipe.min_learning_rate_ratio
    match recipe.scheduler:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1 - floor) * (1 - done / steps)
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done / steps))
        case "wsd":
            decay = min(math.ceil(recipe.decay_ratio * total), steps)
            decayed = done - (steps - decay)
            return 1.0 if decayed <= 0 else floor + (1 - floor) * (1 - math.sqrt(decayed / decay))
        case "inverse_sqrt":
            timescale = (total - steps) or _TIMESCALE
            return math.sqrt(timescale / (done + timescale))
