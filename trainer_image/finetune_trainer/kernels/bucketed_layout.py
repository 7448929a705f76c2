"""Copies a packed row's heads into buckets of segments of similar length, and the results back into
the row.

All buckets are stored end to end in one tensor, so that one `index_select` fills them all and
another one empties them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer.kernels.length_buckets import LengthBucket


@dataclass(frozen=True)
class Bucket:
    """Describes one bucket's slices of the gathered tensors.

    `shape` is (segments x kv heads, queries per key, padded length).
    """

    shape: tuple[int, int, int]
    queries: slice
    keys: slice

    def query(self, gathered: Tensor) -> Tensor:
        """Returns this bucket's slice of `gather_queries`, in `shape` followed by any trailing
        dimensions."""
        return gathered[self.queries].view(*self.shape, *gathered.shape[1:])

    def key(self, gathered: Tensor) -> Tensor:
        """Returns this bucket's slice of `gather_keys`, (segments x kv heads, padded length, …)."""
        return gathered[self.keys].view(self.shape[0], self.shape[2], *gathered.shape[1:])


class BucketedLayout:
    """Maps the heads of each token in a row of `length` tokens to their places in the buckets, and
    back."""

    def __init__(self, length_buckets: Sequence[LengthBucket], length: int, heads: int, kv_heads: int) -> None:
        group = heads // kv_heads
        query_rows, key_rows, self.buckets = [], [], []
        query_start = key_start = 0
        for bucket in length_buckets:
            positions = bucket.positions()
            shape = (len(positions) * kv_heads, group, bucket.size)
            head = np.arange(heads).reshape(1, kv_heads, group, 1)
            padding = positions[:, None, None, :] < 0
            queries = np.where(padding, -1, positions[:, None, None, :] * heads + head).ravel()
            kv_head = np.arange(kv_heads)[None, :, None]
            keys = np.where(padding[:, 0], -1, positions[:, None, :] * kv_heads + kv_head).ravel()
            query_end, key_end = query_start + len(queries), key_start + len(keys)
            self.buckets.append(Bucket(shape, slice(query_start, query_end), slice(key_start, key_end)))
            query_start, key_start = query_end, key_end
            query_rows.append(queries)
            key_rows.append(keys)
        self._length = length
        self._queries = _RowIndex.of(np.concatenate(query_rows), length * heads)
        self._keys = _RowIndex.of(np.concatenate(key_rows), length * kv_heads)

    def gather_queries(self, tensor: Tensor) -> Tensor:
        """Copies (length, heads, …) into the rows of all buckets; padding is 0."""
        return self._queries.gather(tensor.flatten(0, 1))

    def gather_keys(self, tensor: Tensor) -> Tensor:
        """Copies (length, kv heads, …) into the rows of all buckets; padding is 0."""
        return self._keys.gather(tensor.flatten(0, 1))

    def scatter_queries(self, parts: Sequence[Tensor]) -> Tensor:
        """Copies the rows of all buckets back into (length, heads, …)."""
        return _split_heads(self._queries.scatter(parts), self._length)

    def scatter_keys(self, parts: Sequence[Tensor]) -> Tensor:
        """Copies the rows of all buckets back into (length, kv heads, …)."""
        return _split_heads(self._keys.scatter(parts), self._length)


@dataclass(frozen=True)
class _RowIndex:
    """Lists which row of a tensor each row of the buckets copies (`source`), and the inverse
    (`inverse`).

    A padding row copies nothing and contains zeros: whatever it is multiplied by stays finite, so a
    factor of zero removes it from every sum (zero times infinity would be NaN).
    """

    source: Tensor
    padding: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, index: NDArray[np.int64], size: int) -> _RowIndex:
        """Builds both from `index`, which is -1 for padding and names each of `size` rows once."""
        real = index >= 0
        inverse = np.empty(size, dtype=np.int64)
        inverse[index[real]] = np.flatnonzero(real)
        arrays = np.maximum(index, 0), np.flatnonzero(~real), inverse
        return cls(*(torch.as_tensor(array) for array in arrays))

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(0, self.source).index_fill_(0, self.padding, 0)

    def scatter(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).index_select(0, self.inverse)


def _split_heads(tensor: Tensor, length: int) -> Tensor:
    """Reshapes (length x heads, …) to (length, heads, …)."""
    return tensor.view(length, len(tensor) // length, *tensor.shape[1:])
