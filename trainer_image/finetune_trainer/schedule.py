"""The learning rate as a closed form of the step. Pure; called once a step by the loop, which writes it into the
optimizer's groups: there is no scheduler state to save or to step too often."""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["constant", "linear", "cosine"]


def learning_rate(step: int, total: int, *, peak: float, kind: Kind, warmup_ratio: float) -> float:
    """The rate of optimizer step 1 … total.

    It rises in ceil(ratio * total) equal parts that are all more than 0, then is `peak`, and falls so that it would be
    0 one step after the last: no step is wasted at either end.
    """
    warmup = min(math.ceil(warmup_ratio * total), total - 1)
    if step <= warmup:
        return peak * step / (warmup + 1)
    done = (step - 1 - warmup) / (total - warmup)
    if kind == "linear":
        return peak * (1 - done)
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak
