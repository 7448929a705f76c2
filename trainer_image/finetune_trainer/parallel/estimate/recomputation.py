"""Which activations are computed again in the backward pass instead of being stored. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from finetune_api.spec.hardware import Strategy


@dataclass(frozen=True)
class Recomputation:
    """Describes the first layers of a model, a `share` of all of them, whose activations are
    recomputed. With `keeps_attention`, the output of their attention is stored, which takes the
    most time to recompute if rows are long."""

    share: float = 0.0
    keeps_attention: bool = False

    def __bool__(self) -> bool:
        return self.share > 0

    def __str__(self) -> str:
        if self.share < 1:
            return f"activations of {self.share:.0%} of the layers recomputed"
        return "activations recomputed except attention" if self.keeps_attention else "activations recomputed"

    def under(self, strategy: Strategy) -> Recomputation:
        """Returns what a strategy can recompute. ZeRO-3 gathers the weights of attention again only
        if all of a layer is computed again."""
        return replace(self, keeps_attention=False) if strategy == "zero3" else self

    def layers(self, count: int) -> int:
        """Returns how many of `count` layers are recomputed."""
        return math.ceil(self.share * count)


NOTHING = Recomputation()
EVERYTHING = Recomputation(1.0)
SELECTIVE = Recomputation(1.0, keeps_attention=True)

_PARTS = tuple(Recomputation(share, keeps_attention=True) for share in (0.25, 0.5, 0.75))


def possible(option: Literal["auto", "selective", "always", "never"], device: str) -> tuple[Recomputation, ...]:
    """Returns what training.activationCheckpointing permits, ordered from what needs the most
    memory. On a CPU, auto recomputes all layers or none, since memory is rarely short there."""
    match option:
        case "never":
            return (NOTHING,)
        case "always":
            return (EVERYTHING,)
        case "selective":
            return (SELECTIVE,)
    return (NOTHING, EVERYTHING) if device == "cpu" else (NOTHING, *_PARTS, SELECTIVE, EVERYTHING)
