"""Which pieces of a packed row are computed together: those of like length, stacked and padded to the longest.

A matrix product has a price of its own, and padding another; the cheapest division is found by dynamic programming over
the pieces in the order of their length. Pure; called by `attention_cpu` once a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Longer pieces stand alone, and their queries are taken so many at a time: no more is computed than they nearly see.
CHUNK = 128

# Milliseconds of forward and backward together, measured on two cores with 9 heads of 64 (docs/decisions/0021). Only
# their proportions matter: of a stack, of a piece by its padded length, and by the square of that.
_STACK, _TOKEN, _PAIR = 0.3, 1.3e-3, 5e-5

Piece = tuple[int, int]


@dataclass(frozen=True)
class Stack:
    """Pieces that are computed as if each had `size` tokens."""

    pieces: tuple[Piece, ...]
    size: int

    def places(self) -> NDArray[np.int64]:
        """(pieces, size): where each token lies in the row, -1 for padding."""
        begins = np.array([begin for begin, _ in self.pieces])[:, None]
        lengths = np.array([end - begin for begin, end in self.pieces])[:, None]
        within = np.arange(self.size)[None]
        return np.where(within < lengths, begins + within, -1)


def stacks(pieces: Sequence[Piece]) -> tuple[Stack, ...]:
    """Every piece in one stack, the longest stack first."""
    ordered = sorted((piece for piece in pieces if piece[1] > piece[0]), key=lambda piece: (piece[0] - piece[1], piece))
    sizes = [end - begin for begin, end in ordered]
    alone = sum(size > CHUNK for size in sizes)
    found = [Stack((piece,), size) for piece, size in zip(ordered[:alone], sizes[:alone], strict=True)]
    borders = _borders(sizes[alone:])
    for begin, end in itertools.pairwise(borders):
        members = tuple(ordered[alone + begin : alone + end])
        found.append(Stack(members, sizes[alone + begin]))
    return tuple(found)


def _borders(sizes: Sequence[int]) -> list[int]:
    """Where a new stack begins, and the end; `sizes` fall."""
    count = len(sizes)
    cheapest, begins = [0.0] + [float("inf")] * count, [0] * (count + 1)
    for begin in range(count):
        each = _TOKEN * sizes[begin] + _PAIR * sizes[begin] ** 2
        for end in range(begin + 1, count + 1):
            cost = cheapest[begin] + _STACK + (end - begin) * each
            if cost < cheapest[end]:
                cheapest[end], begins[end] = cost, begin
    borders = [count]
    while borders[-1] > 0:
        borders.append(begins[borders[-1]])
    return borders[::-1]
