"""Which tokens of a packed row see each other: examples end to end, what several of them begin with laid down once.

Examples come in an order in which those with a common beginning are neighbours. Of each, only what its predecessor
does not begin with is laid into the row (a trie in depth-first order). Pure; made by `batch`, read by `documents`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Sharing a shorter beginning costs more in small attention calls than it saves.
LEAST_SHARED = 16

# Rows are filled up to a multiple of so many tokens: a CPU keeps a program for each size of a matrix product, and each
# new size costs time and memory; a GPU's products like such sizes too.
GRAIN = 32


@dataclass(frozen=True)
class Block:
    """Every token of [first, last) sees every token of [begin, end), which lies before it."""

    begin: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """A row of `size` tokens. Tokens of a piece see those before them in the piece, and the blocks' tokens."""

    size: int
    pieces: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...] = ()

    def seen_by(self, place: int) -> list[tuple[int, int]]:
        """What a token sees before its own piece, in the order of its example."""
        return sorted((block.begin, block.end) for block in self.blocks if block.first <= place < block.last)


@dataclass(frozen=True)
class Row:
    """`places[i]` says where in the row each token of example i lies."""

    layout: Layout
    places: tuple[NDArray[np.int64], ...]


def filled(tokens: int) -> int:
    """The next multiple of GRAIN."""
    return -(-tokens // GRAIN) * GRAIN


def lay(lengths: Sequence[int], shared: Sequence[int]) -> Row:
    """`shared[i]` tokens of example i are its predecessor's first ones too (0 for the first example). Padding is a
    piece of its own at the end."""
    pieces: list[tuple[int, int]] = []
    places: list[NDArray[np.int64]] = []
    path = _Path()
    size = 0
    for length, common in zip(lengths, shared, strict=True):
        path.cut(common, size)
        own = length - common
        before = places[-1][:common] if common else _NOTHING
        places.append(np.concatenate([before, np.arange(size, size + own)]))
        pieces.append((size, size + own))
        path.extend(size, own)
        size += own
    path.cut(0, size)
    if filled(size) > size:
        pieces.append((size, filled(size)))
    return Row(Layout(filled(size), tuple(pieces), tuple(path.blocks)), tuple(places))


def keep(common: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...]:
    """How much of a common beginning is worth sharing; a token of its own stays to every example."""
    usable = (min(c, n - 1) for c, n in zip(common, lengths, strict=True))
    return tuple(c if c >= LEAST_SHARED else 0 for c in usable)


_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass
class _Part:
    """A run of the current example's beginning: where it lies, and since when later tokens see it whole."""

    begin: int
    size: int
    since: int | None


class _Path:
    """What the next token would see, from the first token on; closes a block when its readers end."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self.blocks: list[Block] = []

    def cut(self, depth: int, now: int) -> None:
        """Only the first `depth` tokens stay; whoever is laid down from `now` on sees them as blocks."""
        kept: list[_Part] = []
        for part in self._parts:
            if part.size <= depth:
                kept.append(part if part.since is not None else _Part(part.begin, part.size, now))
            else:
                self._close(part, now)
                if depth > 0:
                    kept.append(_Part(part.begin, depth, now))
            depth = max(0, depth - part.size)
        self._parts = kept

    def extend(self, begin: int, size: int) -> None:
        self._parts.append(_Part(begin, size, None))

    def _close(self, part: _Part, now: int) -> None:
        if part.since is not None and part.since < now:
            self.blocks.append(Block(part.begin, part.begin + part.size, part.since, now))
