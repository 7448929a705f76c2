"""Lays out a packed row: examples end to end, and a prefix that several of them share only once.

Examples come in an order in which those with a common prefix are neighbors. Only the tokens of an
example that its predecessor doesn't begin with are placed into the row (a trie in depth-first
order). The module is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Sharing a shorter prefix costs more in small attention calls than it saves.
LEAST_SHARED = 16

# Rows are padded to a multiple of this number of tokens. A CPU keeps a program for each size of a
# matrix product, so each new size costs time and memory. A GPU computes products in tiles of 128
# rows, and its allocator can use freed memory again if sizes repeat.
GRAIN = 32
_CUDA_GRAIN = 128


@dataclass(frozen=True)
class SharedBlock:
    """Describes a prefix: the tokens at [first, last) attend to [begin, end), which is earlier."""

    begin: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """Describes a row of `size` tokens.

    The tokens of a segment attend to the tokens before them in the segment, and to those of the
    blocks.
    """

    size: int
    segments: tuple[tuple[int, int], ...]
    blocks: tuple[SharedBlock, ...] = ()

    def prefix_spans(self, position: int) -> list[tuple[int, int]]:
        """Return the spans (begin, end) that a token attends to before its own segment.

        They are in the order of its example.
        """
        return sorted((block.begin, block.end) for block in self.blocks if block.first <= position < block.last)


@dataclass(frozen=True)
class PackedRow:
    """Holds a layout and the tokens in it.

    `positions[i]` are the positions of the tokens of example i in the row. `padding` are the
    positions whose tokens are copied to the end of the row as padding.
    """

    layout: Layout
    positions: tuple[NDArray[np.int64], ...]
    padding: NDArray[np.int64]


def grain(device_type: str) -> int:
    """Return the number of which the sizes of rows are multiples on this kind of device."""
    return _CUDA_GRAIN if device_type == "cuda" else GRAIN


def rounded_up(tokens: int, grain: int = GRAIN) -> int:
    """Return the next multiple of `grain`."""
    return -(-tokens // grain) * grain


def pack(lengths: Sequence[int], shared: Sequence[int], grain: int = GRAIN) -> PackedRow:
    """Pack examples of these lengths into a row, whose size is a multiple of `grain`.

    The first `shared[i]` tokens of example i are those of its predecessor too (0 for the first
    example). Padding comes last, in segments of its own that begin as the longest example does:
    what is computed for it is computed for real tokens anyway, so it overflows only if they do.
    """
    segments: list[tuple[int, int]] = []
    positions: list[NDArray[np.int64]] = []
    prefix = _Prefix()
    size = 0
    for length, common in zip(lengths, shared, strict=True):
        prefix.truncate(common, size)
        own = length - common
        before = positions[-1][:common] if common else _EMPTY
        positions.append(np.concatenate([before, np.arange(size, size + own)]))
        segments.append((size, size + own))
        prefix.extend(size, own)
        size += own
    prefix.truncate(0, size)
    longest = max(positions, key=len, default=_EMPTY)
    padded = rounded_up(size, grain)
    padding = [_EMPTY]
    for begin in range(size, padded, max(1, len(longest))):
        segments.append((begin, min(begin + len(longest), padded)))
        padding.append(longest[: segments[-1][1] - begin])
    layout = Layout(padded, tuple(segments), tuple(prefix.blocks))
    return PackedRow(layout, tuple(positions), np.concatenate(padding))


def shareable(common: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...]:
    """Return how much of each common prefix is worth sharing.

    Every example keeps a token of its own.
    """
    usable = (min(c, n - 1) for c, n in zip(common, lengths, strict=True))
    return tuple(c if c >= LEAST_SHARED else 0 for c in usable)


_EMPTY = np.zeros(0, dtype=np.int64)


@dataclass
class _Part:
    """Describes a run of tokens of the current prefix.

    Tokens from position `since` on attend to all of it; it is None if none do yet.
    """

    begin: int
    size: int
    since: int | None


class _Prefix:
    """Tracks the tokens that the next token would attend to.

    It closes a block when no further token attends to it.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self.blocks: list[SharedBlock] = []

    def truncate(self, depth: int, now: int) -> None:
        """Truncate the prefix to `depth` tokens.

        Segments placed from position `now` on attend to it as shared blocks; blocks that no token
        will attend to any more are closed.
        """
        remaining: list[_Part] = []
        for part in self._parts:
            if part.size <= depth:
                remaining.append(part if part.since is not None else _Part(part.begin, part.size, now))
            else:
                self._close(part, now)
                if depth > 0:
                    remaining.append(_Part(part.begin, depth, now))
            depth = max(0, depth - part.size)
        self._parts = remaining

    def extend(self, begin: int, size: int) -> None:
        """Append the tokens that have been placed at `begin`."""
        self._parts.append(_Part(begin, size, None))

    def _close(self, part: _Part, now: int) -> None:
        if part.since is not None and part.since < now:
            self.blocks.append(SharedBlock(part.begin, part.begin + part.size, part.since, now))
