"""Computes attention over a packed row on CUDA with PyTorch's variable-length flash attention, in
one call per layer.

Each segment is a separate sequence. If a segment attends to a shared prefix, the keys of the prefix
are gathered in front of its own, and the kernel aligns its causal mask with the last key. The
gradient of this gathering is, for each key, the sum over all segments that attend to it. Only
16-bit tensors are supported.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import varlen

from finetune_trainer.data.batching import transfer
from finetune_trainer.data.batching.packed_layout import Layout

# PyTorch before 2.12 requires as many key heads as query heads.
_SUPPORTS_GROUPS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


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
        positions = transfer.to_device(np.concatenate(keys), device) if layout.blocks else None
        longest = [max(len(sequence) for sequence in sequences) for sequences in (queries, keys)]
        return cls(_borders(queries, device), _borders(keys, device), longest[0], longest[1], positions)


def _borders(sequences: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    lengths = (len(sequence) for sequence in sequences)
    return transfer.to_device(np.cumsum([0, *lengths]), device, torch.int32)


def supports(query: Tensor, value: Tensor) -> bool:
    """Returns whether `attend` can compute attention for these tensors."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and half and query.shape[0] == 1 and query.shape[-1] == value.shape[-1] <= 256


def attend(layout: CudaLayout, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Computes attention from (1, heads, length, size) to (1, length, heads, size)."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.key_positions is not None:
        k, v = k.index_select(0, layout.key_positions), v.index_select(0, layout.key_positions)
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if not _SUPPORTS_GROUPS:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
        options = {}
    out = varlen.varlen_attn(
        q, k, v, layout.query_borders, layout.key_borders, layout.longest_query, layout.longest_key,
        scale=scale, window_size=(-1, 0), **options,
    )  # fmt: skip
    return cast(Tensor, out)[None]
