"""A step's examples as micro-batches: bins of nearly equal work, as many for every rank. Pure; called by `plan.cut`.

Each returns a multiple of `world` micro-batches of example numbers, which together hold every example once; a budget of
`tokens` is exceeded only by an example that is longer than that by itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.prefixes import Prefixes


def packed(chosen: Sequence[int], lengths: NDArray[np.int64], world: int, tokens: int) -> list[tuple[int, ...]]:
    """Longest first into the emptiest bin: few bins, all nearly as full, so that no rank waits for another."""
    longest_first = sorted(chosen, key=lambda index: (-int(lengths[index]), index))
    total = int(lengths[list(chosen)].sum())
    per_rank = max(1, math.ceil(total / (world * tokens)))
    while True:
        bins = _fill(longest_first, lengths, tokens, per_rank * world)
        if bins is not None:
            return bins
        per_rank += max(1, per_rank // 16)


def _fill(ordered: Sequence[int], lengths: NDArray[np.int64], budget: int, count: int) -> list[tuple[int, ...]] | None:
    """None where an example doesn't fit into the emptiest bin."""
    heap = [(0, index) for index in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for example in ordered:
        load, index = heap[0]
        size = int(lengths[example])
        if load and load + size > budget:
            return None
        heapq.heapreplace(heap, (load + size, index))
        bins[index].append(example)
    return [tuple(members) for members in bins]


def shared(
    chosen: Sequence[int], lengths: NDArray[np.int64], world: int, tokens: int, prefixes: Prefixes
) -> list[tuple[int, ...]]:
    """Neighbours in content stay together: the order by content is cut into runs of nearly equal work."""
    ordered = prefixes.sorted(chosen)
    whole = [int(lengths[example]) for example in ordered]
    own = [size - common for size, common in zip(whole, prefixes.shared(ordered, lengths), strict=True)]
    per_rank = max(1, math.ceil(sum(own) / (world * tokens)))
    while True:
        runs = _runs(whole, own, tokens, per_rank * world)
        if runs is not None:
            return [tuple(ordered[begin:end]) for begin, end in runs]
        per_rank += max(1, per_rank // 16)


def _runs(whole: list[int], own: list[int], budget: int, count: int) -> list[tuple[int, int]] | None:
    """`count` runs, the largest as small as can be; None where one exceeds the budget with more than one example.

    The first example of a run is computed whole, the others without what they share.
    """
    low, high = max(max(whole), math.ceil(sum(own) / count)), max(budget, max(whole))
    if len(_within(whole, own, high)) > count:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_within(whole, own, middle)) <= count else (middle + 1, high)
    runs = _within(whole, own, high)
    return runs + [(len(whole), len(whole))] * (count - len(runs))


def _within(whole: list[int], own: list[int], limit: int) -> list[tuple[int, int]]:
    """Runs of at most `limit` tokens, each as long as can be."""
    runs, begin, load = [], 0, 0
    for at in range(len(whole)):
        if at > begin and load + own[at] > limit:
            runs.append((begin, at))
            begin, load = at, 0
        load += own[at] if at > begin else whole[at]
    return [*runs, (begin, len(whole))]


def padded(chosen: Sequence[int], lengths: NDArray[np.int64], world: int, rows: int) -> list[tuple[int, ...]]:
    """Examples of like length together; neighbours in length go to different ranks at the same time."""
    longest_first = sorted(chosen, key=lambda index: (-int(lengths[index]), index))
    per_rank = math.ceil(len(chosen) / (world * rows))
    count = per_rank * world
    sizes = [len(chosen) // count + (index < len(chosen) % count) for index in range(count)]
    stream: Iterator[int] = iter(longest_first)
    return [tuple(next(stream) for _ in range(size)) for size in sizes]
