"""Informs attention about the layout of the packed row that is being computed.

Models pass only tensors to attention, so the layout reaches the kernels through this module: it is
declared around the forward and backward passes of a row, and every layer reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch

from finetune_trainer.data.batching.packed_layout import Layout
from finetune_trainer.kernels.attention_avx512 import NativeLayout
from finetune_trainer.kernels.bucketed_layout import BucketedLayout
from finetune_trainer.kernels.cuda.flash_layout import CudaLayout
from finetune_trainer.kernels.length_buckets import length_buckets


class CurrentRow:
    """Holds a row's layout in the form of each kernel. Each form is built once and shared by all
    layers."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._cuda: CudaLayout | None = None
        self._bucketed: dict[tuple[int, int], BucketedLayout] = {}

    @cached_property
    def native(self) -> NativeLayout:
        """The layout for the compiled CPU kernel."""
        return NativeLayout(self.layout)

    def cuda(self, device: torch.device) -> CudaLayout:
        """Returns the layout for the CUDA kernel, with its indices on `device`."""
        if self._cuda is None:
            self._cuda = CudaLayout.of(self.layout, device)
        return self._cuda

    def bucketed(self, heads: int, kv_heads: int) -> BucketedLayout:
        """Returns the layout for batched products with these numbers of query heads and key
        heads."""
        key = heads, kv_heads
        if key not in self._bucketed:
            self._bucketed[key] = BucketedLayout(length_buckets(self.layout.segments), self.layout.size, *key)
        return self._bucketed[key]


# A plain global suffices, since only one thread at a time computes a micro-batch. A ContextVar
# would be wrong: autograd runs the backward pass on CUDA in a thread of its own, which has a
# different context, so activations would be recomputed there as if the row weren't packed.
_current: CurrentRow | None = None


@contextmanager
def computing(layout: Layout | None) -> Iterator[None]:
    """Declares the layout of the row whose forward and backward passes run inside.

    None declares that the batch isn't packed.
    """
    global _current
    previous, _current = _current, None if layout is None else CurrentRow(layout)
    try:
        yield
    finally:
        _current = previous


def current() -> CurrentRow | None:
    """Returns the row that is being computed, or None if the batch isn't packed."""
    return _current
