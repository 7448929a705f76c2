"""What to do about steps that went wrong, decided from the losses and skipped steps so far. Pure.

A skipped step, or one that was rolled back, counts as done. Its rows are passed over, and the step
after it is the same as in any other run, so a resumed run skips the same ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.checkpoint.state import Skipped

MAX_SKIPPED_IN_A_ROW = 3
"""This many skipped steps in a row are no accident: weights or data are broken."""
WINDOW, MIN_LOSSES = 50, 20
"""How many losses a spike is compared with, at most and at least."""
SPIKE_STEPS = 3
"""This many high losses in a row make a spike. A single one is a hard batch, which does no harm."""
DEVIATIONS = 8.0


@dataclass(frozen=True)
class Spike:
    """The last `steps` losses, of which `loss` is the latest, were all above `limit`."""

    steps: int
    loss: float
    limit: float


def too_many(skipped: Sequence[Skipped], limit: int) -> str | None:
    """Why the run must fail after its latest skipped step, or None if it can continue.

    `limit` is training.maxSkippedSteps. Steps that were rolled back after a spike don't count.
    """
    non_finite = [skip for skip in skipped if skip.reason != "LossSpike"]
    if not non_finite:
        return None
    if len(non_finite) > limit:
        return f"{len(non_finite)} steps were skipped; training.maxSkippedSteps is {limit}"
    in_a_row = 1
    while in_a_row < len(non_finite) and non_finite[-in_a_row].first == non_finite[-in_a_row - 1].last + 1:
        in_a_row += 1
    return f"{in_a_row} steps in a row were skipped" if in_a_row >= MAX_SKIPPED_IN_A_ROW else None


def recent(losses: Sequence[float], loss: float) -> tuple[float, ...]:
    """The losses that `spike` looks at, with one more."""
    return (*losses, loss)[-(WINDOW + SPIKE_STEPS) :]


def spike(losses: Sequence[float]) -> Spike | None:
    """Whether the last losses are all far above the earlier ones.

    The limit is the median of the earlier losses plus the larger of 8 standard deviations,
    estimated as 1.4826 times the median absolute deviation (Hampel's identifier; Leys et al. 2013),
    and half the median. Without the latter, losses that hardly vary would turn noise into a spike.
    """
    earlier, last = losses[:-SPIKE_STEPS], losses[-SPIKE_STEPS:]
    if len(earlier) < MIN_LOSSES:
        return None
    median = statistics.median(earlier)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in earlier)
    limit = median + max(DEVIATIONS * deviation, median / 2)
    return Spike(SPIKE_STEPS, last[-1], limit) if min(last) > limit else None
