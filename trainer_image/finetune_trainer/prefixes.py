"""Which examples begin alike: their order by content, and how much neighbours in that order share. Pure; no torch.

Computed once a token cache (`tokens`), read by `plan`, `batch` and `split`. A system prompt, an instruction, or the
prompt of several answers, in front of many examples, is found without anybody saying so.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_trainer import layout

_TOGETHER = 1 << 20  # tokens


@dataclass(frozen=True)
class Prefixes:
    """`rank[i]` is example i's place among all of the cache, ordered by content; `common[r]` how many tokens places
    r-1 and r begin with alike. Several splits of a cache share `common`."""

    rank: NDArray[np.int64]
    common: NDArray[np.int64]

    def of(self, index: NDArray[np.int64]) -> Prefixes:
        """Of a part of the examples."""
        return Prefixes(self.rank[index], self.common)

    def sorted(self, chosen: Sequence[int]) -> list[int]:
        """Examples that begin alike side by side."""
        return sorted(chosen, key=lambda example: (int(self.rank[example]), example))

    def shared(self, ordered: Sequence[int], lengths: NDArray[np.int64]) -> tuple[int, ...]:
        """Tokens that each takes from the one before it, in a row of these examples in this order (0 for the first).

        An example that comes again (in another epoch) shares all but its last token.
        """
        if not ordered:
            return ()
        places = [int(self.rank[example]) for example in ordered]
        common = [0]
        for before, after in itertools.pairwise(places):
            if after > before:
                common.append(int(self.common[before + 1 : after + 1].min()))
            else:
                common.append(int(lengths[ordered[len(common)]]) if after == before else 0)
        return layout.keep(common, [int(lengths[example]) for example in ordered])

    def saved(self, index: NDArray[np.int64], lengths: NDArray[np.int64]) -> int:
        """The sum of `shared` over these different examples in the order of `sorted`, for many of them."""
        if len(index) < 2:
            return 0
        order = index[np.argsort(self.rank[index], kind="stable")]
        places = self.rank[order]
        common = np.minimum.reduceat(self.common[: places[-1] + 1], places[:-1] + 1)
        usable = np.minimum(common, lengths[order[1:]] - 1)
        return int(usable[usable >= layout.LEAST_SHARED].sum())


def find(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    *,
    together: int = _TOGETHER,
    alive: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rank of each example, tokens that places r-1 and r of that order have in common)

    About `together` tokens at a time are sorted in memory, then what was sorted is merged. `alive` is called meanwhile.
    """
    ids, offsets = np.asarray(ids), np.asarray(offsets)  # a slice of a memmap is slow
    count = len(offsets) - 1
    order = np.empty(count, dtype=np.int64)
    runs = []
    begin = 0
    while begin < count:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + together, side="right")) - 1)
        order[begin:end] = begin + _sorted(ids, offsets[begin : end + 1])
        runs.append(order[begin:end].copy())
        alive()
        begin = end

    def key(row: int) -> bytes:
        return ids[offsets[row] : offsets[row + 1]].astype(">u4").tobytes()

    if len(runs) > 1:
        for place, row in enumerate(heapq.merge(*(map(int, run) for run in runs), key=key)):
            order[place] = row
            alive()
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    common = np.zeros(count, dtype=np.int64)
    for place in range(1, count):
        one, other = int(order[place - 1]), int(order[place])
        common[place] = _common(ids[offsets[one] : offsets[one + 1]], ids[offsets[other] : offsets[other + 1]])
        alive()
    return rank, common


def _sorted(ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of some rows by content; equal ones keep theirs."""
    text = ids[offsets[0] : offsets[-1]].astype(">u4").tobytes()
    ends = ((offsets - offsets[0]) * 4).tolist()
    return np.array(sorted(range(len(ends) - 1), key=lambda row: text[ends[row] : ends[row + 1]]), dtype=np.int64)


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size
