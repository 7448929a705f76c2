"""Decides which segments of a packed row are computed together: those of similar length, padded to
the longest of them.

Each matrix product has a fixed cost, and padding has a cost of its own. Dynamic programming over
the segments in order of length finds the cheapest division. This module is pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# In tokens. A longer segment gets a bucket of its own, and its queries are computed in chunks of
# this size, so that few scores are computed only to be hidden by the causal mask.
CHUNK = 128

# In milliseconds, for the forward and backward passes together, measured on two cores with 9 heads
# of size 64 (docs/decisions/0021): per bucket, per token of a segment's padded length, and per
# square of that length. Only the proportions matter.
_BUCKET, _TOKEN, _PAIR = 0.3, 1.3e-3, 5e-5

Segment = tuple[int, int]


@dataclass(frozen=True)
class LengthBucket:
    """Describes segments that are computed as if each had `size` tokens."""

    segments: tuple[Segment, ...]
    size: int

    def positions(self) -> NDArray[np.int64]:
        """Returns the position in the row of each token, (segments, size); -1 for padding."""
        begins = np.array([begin for begin, _ in self.segments])[:, None]
        lengths = np.array([end - begin for begin, end in self.segments])[:, None]
        offsets = np.arange(self.size)[None]
        return np.where(offsets < lengths, begins + offsets, -1)


def length_buckets(segments: Sequence[Segment]) -> tuple[LengthBucket, ...]:
    """Puts every nonempty segment into one bucket. The buckets of the longest segments come
    first."""
    ordered = sorted((s for s in segments if s[1] > s[0]), key=lambda s: (s[0] - s[1], s))
    sizes = [end - begin for begin, end in ordered]
    long = sum(size > CHUNK for size in sizes)
    buckets = [LengthBucket((segment,), size) for segment, size in zip(ordered[:long], sizes[:long], strict=True)]
    for begin, end in itertools.pairwise(_borders(sizes[long:])):
        members = tuple(ordered[long + begin : long + end])
        buckets.append(LengthBucket(members, sizes[long + begin]))
    return tuple(buckets)


def _borders(sizes: Sequence[int]) -> list[int]:
    """Returns the indices at which the cheapest buckets begin, and the end. `sizes` must not
    increase."""
    count = len(sizes)
    cheapest, begins = [0.0] + [float("inf")] * count, [0] * (count + 1)
    for begin in range(count):
        per_segment = _TOKEN * sizes[begin] + _PAIR * sizes[begin] ** 2
        for end in range(begin + 1, count + 1):
            cost = cheapest[begin] + _BUCKET + (end - begin) * per_segment
            if cost < cheapest[end]:
                cheapest[end], begins[end] = cost, begin
    borders = [count]
    while borders[-1] > 0:
        borders.append(begins[borders[-1]])
    return borders[::-1]
