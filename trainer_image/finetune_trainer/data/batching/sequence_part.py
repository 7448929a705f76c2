"""Says which part of a packed row a rank computes, if several ranks share each row (sequence
parallelism).

Each rank of a group has an equal part of the row's tokens, in the order of the ranks. Positions and
targets are those of the whole row: they are determined before the row is divided, so that the last
token of a part predicts the first one of the next part. The module is pure and doesn't import
torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line has no numpy without its extra
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SequencePart:
    """Describes part number `rank`, counted from 0, of `size` equal parts. `group` is the name of
    the process group of the ranks that share a row."""

    rank: int = 0
    size: int = 1
    group: str = ""

    def __bool__(self) -> bool:
        """Whether rows are divided at all."""
        return self.size > 1

    def columns(self, length: int) -> slice:
        """Returns the positions of this part in a row of `length` tokens, a multiple of `size`."""
        own = length // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def within(self, positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Returns the indices of those of the `positions` in such a row that are in this part."""
        columns = self.columns(length)
        indices: NDArray[np.int64] = ((positions >= columns.start) & (positions < columns.stop)).nonzero()[0]
        return indices


WHOLE = SequencePart()
"""Every rank computes rows of its own."""


def key_copies(kv_heads: int, size: int) -> int:
    """Returns how often each key head is sent, so that `size` ranks get equal numbers of them.

    Each rank then has the keys of its own queries and no others: with 8 key heads for 32 query
    heads on 16 ranks, each key head is sent to two ranks, both of which have two of its queries.
    """
    return math.lcm(kv_heads, size) // kv_heads
