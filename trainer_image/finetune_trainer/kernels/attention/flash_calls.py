"""Divides a packed row into calls of the variable-length flash kernel.

Each segment is a sequence of its own. If a segment attends to a shared prefix, the keys of the
prefix are gathered in front of its own, and the kernel aligns its causal mask, and a window, with
the last key. Gathered keys are copies, so a call gathers at most GATHERED_KEYS times the row's
tokens; more segments are computed in further calls.

The gradient of a key is the sum over all segments that attend to it. It is computed in float32 and
always in the same order, because the backward pass of `index_select` would add one after another in
16 bits, in an order that varies on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer.data.batching import transfer
from finetune_trainer.data.batching.packed_layout import Layout
from finetune_trainer.kernels.sizes import GATHERED_KEYS


@dataclass(frozen=True)
class GatheredKeys:
    """Lists the `positions` in the row of the keys of a call's sequences, end to end.

    `order` lists the gathered keys by position, and `readers` how many there are of each of the
    `targets`, the positions in ascending order.
    """

    positions: Tensor
    order: Tensor
    readers: Tensor
    targets: Tensor

    @classmethod
    def of(cls, positions: NDArray[np.int64], device: torch.device) -> GatheredKeys:
        targets, readers = np.unique(positions, return_counts=True)
        arrays = positions, np.argsort(positions, kind="stable"), readers, targets
        return cls(*(transfer.to_device(array, device) for array in arrays))

    def gather(self, tensor: Tensor) -> Tensor:
        """Copies (length, heads, size) to (gathered keys, heads, size)."""
        return tensor.index_select(0, self.positions)

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of the gathered keys to `total`, (length, heads, size), in place and in
        the dtype of `total`."""
        by_target = gradient.index_select(0, self.order).to(total.dtype)
        sums = torch.segment_reduce(by_target, "sum", lengths=self.readers, axis=0, unsafe=True)
        total.index_copy_(0, self.targets, total.index_select(0, self.targets) + sums)


@dataclass(frozen=True)
class FlashCall:
    """Describes one call of the kernel, for the queries [first, last) of the row.

    `query_borders` and `key_borders` are the cumulative lengths of the sequences. `gathered` is
    None if each sequence attends only to its own tokens.
    """

    first: int
    last: int
    query_borders: Tensor
    key_borders: Tensor
    longest_query: int
    longest_key: int
    gathered: GatheredKeys | None

    def queries(self, tensor: Tensor) -> Tensor:
        """Returns the call's part of a tensor of the shape (length, …)."""
        return tensor[self.first : self.last]

    def keys(self, tensor: Tensor) -> Tensor:
        """Returns the keys or values of all sequences, end to end."""
        return self.queries(tensor) if self.gathered is None else self.gathered.gather(tensor)


def flash_calls(layout: Layout, device: torch.device) -> tuple[FlashCall, ...]:
    """Returns the calls that compute a row, with their indices on `device`."""
    segments = [segment for segment in layout.segments if segment[1] > segment[0]]
    if not layout.blocks:
        queries = [np.arange(*segment) for segment in segments]
        return (_call(queries, queries, None, device),)
    sequences = [(np.arange(*segment), _key_positions(layout, segment)) for segment in segments]
    return tuple(
        _call([q for q, _ in part], [k for _, k in part], np.concatenate([k for _, k in part]), device)
        for part in _parts(sequences, GATHERED_KEYS * layout.size)
    )


_Sequence = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The positions of a sequence's queries and of its keys."""


def _key_positions(layout: Layout, segment: tuple[int, int]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(*span) for span in (*layout.prefix_spans(segment[0]), segment)])


def _parts(sequences: Sequence[_Sequence], most: int) -> Iterator[list[_Sequence]]:
    """Yields sequences that follow each other and have at most `most` keys together."""
    part: list[_Sequence] = []
    keys = 0
    for sequence in sequences:
        if part and keys + len(sequence[1]) > most:
            yield part
            part, keys = [], 0
        part.append(sequence)
        keys += len(sequence[1])
    yield part


def _call(
    queries: Sequence[NDArray[np.int64]],
    keys: Sequence[NDArray[np.int64]],
    gathered: NDArray[np.int64] | None,
    device: torch.device,
) -> FlashCall:
    return FlashCall(
        int(queries[0][0]), int(queries[-1][-1]) + 1, _borders(queries, device), _borders(keys, device),
        max(len(sequence) for sequence in queries), max(len(sequence) for sequence in keys),
        None if gathered is None else GatheredKeys.of(gathered, device),
    )  # fmt: skip


def _borders(sequences: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    lengths = (len(sequence) for sequence in sequences)
    return transfer.to_device(np.cumsum([0, *lengths]), device, torch.int32)
