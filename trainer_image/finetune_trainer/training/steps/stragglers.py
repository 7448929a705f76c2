"""Decides whether a rank stays slower than the others, from the seconds that each rank needed for
its own part of a step. Pure.

A single slow step means nothing: the kernel, a checkpoint or a long row can cause one. A rank is a
straggler if it was the slowest by at least 20% in more than half of the last 20 steps.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW = 20  # steps
RATIO = 1.2


@dataclass(frozen=True)
class Straggler:
    """A rank that stays slower than the others: `ratio` is its time per token divided by the median
    of the others, in the middle one of the steps in which it was the slowest."""

    rank: int
    ratio: float


def slowest(seconds: Sequence[float], tokens: Sequence[int]) -> Straggler | None:
    """Returns the slowest rank of a step, whatever its ratio is; None if fewer than two ranks had
    tokens.

    `seconds` and `tokens` are those of each rank. Ranks are compared by their time per token,
    because they don't get equally many.
    """
    speeds = [(time / count, rank) for rank, (time, count) in enumerate(zip(seconds, tokens, strict=True)) if count]
    if len(speeds) < 2:
        return None
    worst, rank = max(speeds)
    others = statistics.median(speed for speed, other in speeds if other != rank)
    return Straggler(rank, worst / others) if others > 0 else None


@dataclass
class StragglerWatch:
    """Remembers the last steps of a run. `current` is the straggler that was reported last."""

    current: Straggler | None = None
    _slow: deque[Straggler | None] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, seconds: Sequence[float], tokens: Sequence[int]) -> bool:
        """Adds a step. Returns whether `current` changed to another rank, or to None."""
        step = slowest(seconds, tokens)
        self._slow.append(step if step is not None and step.ratio >= RATIO else None)
        before, self.current = self.current, self._straggler()
        return (before and before.rank) != (self.current and self.current.rank)

    def _straggler(self) -> Straggler | None:
        """Returns the rank that was slow in more than half of the steps. One that was reported
        remains a straggler until it is slow in fewer than a quarter of them."""
        by_rank: dict[int, list[float]] = {}
        for step in self._slow:
            if step is not None:
                by_rank.setdefault(step.rank, []).append(step.ratio)
        rank = max(by_rank, key=lambda one: len(by_rank[one]), default=-1)
        if len(by_rank.get(rank, ())) <= WINDOW // 2 and self.current is not None:
            rank = self.current.rank
        least = WINDOW // 4 if self.current is not None and self.current.rank == rank else WINDOW // 2 + 1
        ratios = by_rank.get(rank, [])
        return Straggler(rank, statistics.median(ratios)) if len(ratios) >= least else None
