"""Which examples begin alike: their order by content, and how much neighbours in that order share. Pure; no torch.

Computed once a token cache (`tokens`), read by `plan`, `batch` and `split`. A system prompt, an instruction, or the
prompt of several answers, in front of many examples, is found without anybody saying so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_trainer import layout


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


def find(ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rank of each example, tokens that places r-1 and r of that order have in common)"""
    rows = [ids[begin:end] for begin, end in itertools.pairwise(offsets)]
    order = sorted(range(len(rows)), key=lambda row: rows[row].astype(">u4").tobytes())
    rank = np.empty(len(rows), dtype=np.int64)
    rank[order] = np.arange(len(rows))
    common = np.zeros(len(rows), dtype=np.int64)
    for place in range(1, len(rows)):
        common[place] = _common(rows[order[place - 1]], rows[order[place]])
    return rank, common


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size
