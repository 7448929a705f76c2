"""Describes the layout of a packed row in the form that flash attention on CUDA reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer.data.batching.packed_layout import Layout


@dataclass(frozen=True)
class CudaLayout:
    """Describes a packed row's layout in the form that the kernel reads.

    `query_borders` and `key_borders` are the cumulative lengths of the sequences. `key_positions`
    are the positions in the row of the keys of all sequences; None means that each sequence attends
    only to its own tokens.
    """

    query_borders: Tensor
    key_borders: Tensor
    longest_query: int
    longest_key: int
    key_positions: Tensor | None

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> CudaLayout:
        queries = [np.arange(begin, end) for begin, end in layout.segments]
        keys = [np.concatenate([*(np.arange(*part) for part in layout.prefix_spans(own[0])), own]) for own in queries]
        positions = torch.as_tensor(np.concatenate(keys), device=device) if layout.blocks else None
        longest = [max(len(sequence) for sequence in sequences) for sequences in (queries, keys)]
        return cls(_borders(queries, device), _borders(keys, device), longest[0], longest[1], positions)


def _borders(sequences: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    lengths = (len(sequence) for sequence in sequences)
    return torch.as_tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
