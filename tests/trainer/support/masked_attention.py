"""Attention over a packed row with one mask over all of it, in float64: what every kernel must
equal."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainer.data.batching import packed_layout
from finetune_trainer.data.batching.packed_layout import Layout

SCALE = 0.2


@dataclass(frozen=True)
class Problem:
    """Describes a packed row, the shape of its heads, and the options of attention."""

    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    heads: int
    kv_heads: int
    size: int
    window: int = 0
    softcap: float = 0.0
    has_sinks: bool = False

    @property
    def row(self) -> Layout:
        return packed_layout.pack(self.lengths, self.shared).layout

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Returns query, key, value and sinks, which are empty if there are none."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.window)
        length = self.row.size
        tensors = [
            torch.randn(1, length, heads, self.size, generator=generator).to(dtype).transpose(1, 2)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]
        sinks = torch.randn(self.heads if self.has_sinks else 0, generator=generator)
        return [*tensors, sinks.to(torch.float64 if dtype == torch.float64 else torch.float32)]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the gradient of the output."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(1, self.row.size, self.heads, self.size, generator=generator).to(dtype)


@st.composite
def problems(draw: st.DrawFn, *, multiple: int = 8, softcaps: bool = False) -> Problem:
    """Draws rows with and without shared beginnings, of heads whose size is a multiple of
    `multiple`."""
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=5))
    shared = [0]
    for before, length in itertools.pairwise(lengths):
        most = min(before, length - 1)
        shared.append(draw(st.sampled_from([0, most] if most >= packed_layout.LEAST_SHARED else [0])))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return Problem(
        tuple(lengths), tuple(shared), kv_heads * draw(st.sampled_from([1, 2, 4])), kv_heads,
        multiple * draw(st.integers(1, 3)), window=draw(st.sampled_from([0, 1, 2, 7, 16, 33, 200])),
        softcap=draw(st.sampled_from([0.0, 0.7])) if softcaps else 0.0, has_sinks=draw(st.booleans()),
    )  # fmt: skip


def visible(row: Layout, window: int) -> Tensor:
    """Returns which token (row) attends to which (column)."""
    mask = np.zeros((row.size, row.size), dtype=bool)
    for begin, end in row.segments:
        before = [position for span in row.prefix_spans(begin) for position in range(*span)]
        example = [*before, *range(begin, end)]
        for index in range(len(before), len(example)):
            first = max(0, index - window + 1) if window else 0
            mask[example[index], example[first : index + 1]] = True
    return torch.tensor(mask)


def expected(problem: Problem, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of query, key, value and sinks in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    query, key, value, sinks = leaves
    group = problem.heads // problem.kv_heads
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * SCALE
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.masked_fill(~visible(problem.row, problem.window), float("-inf"))
    if problem.has_sinks:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    out = (torch.softmax(scores, -1)[..., : problem.row.size] @ value).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.double(), allow_unused=not problem.has_sinks)]
