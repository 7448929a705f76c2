"""Finds which examples begin with the same tokens, and how many of them.

A system prompt, an instruction, or the prompt of several answers, which many examples begin with,
is shared without any setting. The module is pure and doesn't import torch.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batching import packed_layout

_SORTED_TOKENS = 1 << 20  # tokens that are sorted in memory at a time


@dataclass(frozen=True)
class SharedPrefixes:
    """Holds the order of examples by content, and what neighbors in it have in common.

    `rank[i]` is the position of example i in the order of all examples of the cache. `common[r]` is
    the number of tokens that the examples at positions r-1 and r have in common at their beginning.
    Several splits of a cache share `common`.
    """

    rank: NDArray[np.int64]
    common: NDArray[np.int64]

    def of(self, index: NDArray[np.int64]) -> SharedPrefixes:
        """Return the prefixes of some of the examples."""
        return SharedPrefixes(self.rank[index], self.common)

    def sorted(self, examples: Sequence[int]) -> list[int]:
        """Sort examples so that those with a common prefix are neighbors."""
        return sorted(examples, key=lambda example: (int(self.rank[example]), example))

    def shared(self, ordered: Sequence[int], lengths: NDArray[np.int64]) -> tuple[int, ...]:
        """Return how many tokens each example can reuse from the one before it (0 for the first).

        The examples are packed into a row in this order. An example that comes again, in another
        epoch, reuses all of its tokens except the last.
        """
        if not ordered:
            return ()
        ranks = [int(self.rank[example]) for example in ordered]
        common = [0]
        for before, after in itertools.pairwise(ranks):
            if after > before:
                common.append(int(self.common[before + 1 : after + 1].min()))
            else:
                common.append(int(lengths[ordered[len(common)]]) if after == before else 0)
        return packed_layout.shareable(common, [int(lengths[example]) for example in ordered])

    def saved(self, index: NDArray[np.int64], lengths: NDArray[np.int64]) -> int:
        """Return how many tokens prefix sharing saves over these examples, which must be different
        ones.

        This is the vectorized form of `sum(shared(sorted(index)))`.
        """
        if len(index) < 2:
            return 0
        order = index[np.argsort(self.rank[index], kind="stable")]
        ranks = self.rank[order]
        common = np.minimum.reduceat(self.common[: ranks[-1] + 1], ranks[:-1] + 1)
        usable = np.minimum(common, lengths[order[1:]] - 1)
        return int(usable[usable >= packed_layout.LEAST_SHARED].sum())


def find(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    *,
    sorted_tokens: int = _SORTED_TOKENS,
    heartbeat: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (rank, common) of SharedPrefixes for examples whose tokens are
    ids[offsets[i]:offsets[i+1]].

    About `sorted_tokens` tokens at a time are sorted in memory, and the sorted runs are merged.
    """
    ids, offsets = np.asarray(ids), np.asarray(offsets)  # a slice of a memmap is slow
    count = len(offsets) - 1
    order = np.empty(count, dtype=np.int64)
    runs = []
    begin = 0
    while begin < count:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + sorted_tokens, side="right")) - 1)
        order[begin:end] = begin + _order(ids, offsets[begin : end + 1])
        runs.append(order[begin:end].copy())
        heartbeat()
        begin = end

    def tokens_of(row: int) -> NDArray[np.int32]:
        """Return the tokens of an example."""
        return ids[offsets[row] : offsets[row + 1]]

    if len(runs) > 1:
        merged = heapq.merge(*(map(int, run) for run in runs), key=lambda row: tokens_of(row).astype(">u4").tobytes())
        for position, row in enumerate(merged):
            order[position] = row
            heartbeat()
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    common = np.zeros(count, dtype=np.int64)
    for position in range(1, count):
        common[position] = _common_prefix(tokens_of(int(order[position - 1])), tokens_of(int(order[position])))
        heartbeat()
    return rank, common


def _order(ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort some rows by content; equal rows stay in their order."""
    text = ids[offsets[0] : offsets[-1]].astype(">u4").tobytes()
    ends = ((offsets - offsets[0]) * 4).tolist()
    return np.array(sorted(range(len(ends) - 1), key=lambda row: text[ends[row] : ends[row + 1]]), dtype=np.int64)


def _common_prefix(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    size = min(len(first), len(second))
    differences = np.flatnonzero(first[:size] != second[:size])
    return int(differences[0]) if len(differences) else size
