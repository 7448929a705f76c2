"""What is done about steps that went wrong: losses and refusals so far → a verdict. Pure; called by the loop.

A refused or undone step counts as done: its rows are passed over, and the step after it is the same as in any other
run, so that a resumed run refuses and undoes the same ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from finetune_api.model import LenientModel

IN_A_ROW = 3
"""So many refused steps one after the other are no accident: weights or data are broken."""
WINDOW, ENOUGH = 50, 20
"""The losses that a spike is measured against, at most and at least."""
LASTING = 3
"""So many losses in a row make a spike. One alone is a hard batch, which does no harm."""
DEVIATIONS = 8.0

Reason = Literal["NonFiniteLoss", "NonFiniteGradient", "LossSpike"]


class Skipped(LenientModel):
    """Steps that changed nothing. `rows` are lines of dataset.uri."""

    first: int
    last: int
    reason: Reason
    rows: tuple[int, ...] = Field(default=(), description="Empty after a spike: all rows of these steps.")

    @property
    def steps(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Spike:
    """`lasts` losses in a row above `limit`."""

    lasts: int
    loss: float
    limit: float


def steps(skipped: Sequence[Skipped], reason: Reason | None = None) -> int:
    """How many steps changed nothing, for one reason or any."""
    return sum(some.steps for some in skipped if reason in (None, some.reason))


def too_many(skipped: Sequence[Skipped], most: int) -> str | None:
    """Why the run can't go on after its latest refused step; None while it can. `most` is training.maxSkippedSteps."""
    refused = [some for some in skipped if some.reason != "LossSpike"]
    if not refused:
        return None
    if len(refused) > most:
        return f"{len(refused)} steps were refused; training.maxSkippedSteps is {most}"
    run = 1
    while run < len(refused) and refused[-run].first == refused[-run - 1].last + 1:
        run += 1
    return f"{run} steps in a row were refused" if run >= IN_A_ROW else None


def remembered(losses: Sequence[float], loss: float) -> tuple[float, ...]:
    """The losses that `spike` looks at, with one more."""
    return (*losses, loss)[-(WINDOW + LASTING) :]


def spike(losses: Sequence[float]) -> Spike | None:
    """Whether the last losses left the others behind for good.

    The limit is the median of the losses before plus the larger of 8 standard deviations, estimated as 1.4826 times the
    median absolute deviation (Hampel's identifier; Leys et al. 2013), and half the median: losses that hardly vary must
    not make a spike out of nothing.
    """
    before, last = losses[:-LASTING], losses[-LASTING:]
    if len(before) < ENOUGH:
        return None
    middle = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in before)
    limit = middle + max(DEVIATIONS * deviation, middle / 2)
    return Spike(LASTING, last[-1], limit) if min(last) > limit else None


def listed(lines: Sequence[int]) -> str:
    """At most 20 of them, for people."""
    more = f" and {len(lines) - 20} more" if len(lines) > 20 else ""
    return ", ".join(str(line) for line in lines[:20]) + more
