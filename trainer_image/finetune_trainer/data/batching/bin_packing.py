"""Divides the examples of a step into micro-batches of nearly equal work.

Every function is pure and returns a multiple of `world` micro-batches of example numbers, which
together contain every example once. Only an example that is longer by itself exceeds a budget of
`tokens`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.shared_prefixes import SharedPrefixes


def packed(examples: Sequence[int], lengths: NDArray[np.int64], world: int, tokens: int) -> list[tuple[int, ...]]:
    """Put the longest example first into the emptiest bin.

    This gives few bins that are all nearly equally full, so no rank waits for another.
    """
    longest_first = sorted(examples, key=lambda index: (-int(lengths[index]), index))
    total = int(lengths[list(examples)].sum())
    per_rank = max(1, math.ceil(total / (world * tokens)))
    while True:
        bins = _fill(longest_first, lengths, tokens, per_rank * world)
        if bins is not None:
            return bins
        per_rank += max(1, per_rank // 16)


def _fill(ordered: Sequence[int], lengths: NDArray[np.int64], budget: int, count: int) -> list[tuple[int, ...]] | None:
    """Return None if an example doesn't fit into the emptiest bin."""
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
    examples: Sequence[int], lengths: NDArray[np.int64], world: int, tokens: int, prefixes: SharedPrefixes
) -> list[tuple[int, ...]]:
    """Cut the order by content into runs of nearly equal work, which keeps neighbors together."""
    ordered = prefixes.sorted(examples)
    full = [int(lengths[example]) for example in ordered]
    own = [size - common for size, common in zip(full, prefixes.shared(ordered, lengths), strict=True)]
    per_rank = max(1, math.ceil(sum(own) / (world * tokens)))
    while True:
        runs = _runs(full, own, tokens, per_rank * world)
        if runs is not None:
            return [tuple(ordered[begin:end]) for begin, end in runs]
        per_rank += max(1, per_rank // 16)


def _runs(full: list[int], own: list[int], budget: int, count: int) -> list[tuple[int, int]] | None:
    """Return `count` runs of which the largest is as small as possible.

    The first example of a run is computed in full, and the others without the tokens that they
    share. Returns None if a run of more than one example exceeds the budget.
    """
    low, high = max(max(full), math.ceil(sum(own) / count)), max(budget, max(full))
    if len(_within(full, own, high)) > count:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_within(full, own, middle)) <= count else (middle + 1, high)
    runs = _within(full, own, high)
    return runs + [(len(full), len(full))] * (count - len(runs))


def _within(full: list[int], own: list[int], limit: int) -> list[tuple[int, int]]:
    """Return runs of at most `limit` tokens, each as long as possible."""
    runs, begin, load = [], 0, 0
    for index in range(len(full)):
        if index > begin and load + own[index] > limit:
            runs.append((begin, index))
            begin, load = index, 0
        load += own[index] if index > begin else full[index]
    return [*runs, (begin, len(full))]


def padded(examples: Sequence[int], lengths: NDArray[np.int64], world: int, rows: int) -> list[tuple[int, ...]]:
    """Group examples of similar length.

    Neighbors in length go to different ranks at the same time.
    """
    longest_first = sorted(examples, key=lambda index: (-int(lengths[index]), index))
    per_rank = math.ceil(len(examples) / (world * rows))
    count = per_rank * world
    sizes = [len(examples) // count + (index < len(examples) % count) for index in range(count)]
    stream: Iterator[int] = iter(longest_first)
    return [tuple(next(stream) for _ in range(size)) for size in sizes]
