"""Informs attention about the layout of the packed row that is being computed.

Models pass only tensors to attention, so the layout reaches the kernels through this module: it is
declared around the forward and backward passes of a row, and every layer reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

from finetune_trainer.data.batching.packed_layout import Layout
from finetune_trainer.data.batching.sequence_part import WHOLE, SequencePart
from finetune_trainer.kernels.attention_avx512 import NativeLayout
from finetune_trainer.kernels.bucketed_layout import BucketedLayout
from finetune_trainer.kernels.length_buckets import length_buckets

_T = TypeVar("_T")


class CurrentRow:
    """Holds a row's layout in the form of each kernel. Each form is built once and shared by all
    layers.

    `sequence` is the part of the row whose tokens this rank has outside of attention.
    """

    def __init__(self, layout: Layout, sequence: SequencePart = WHOLE) -> None:
        self.layout = layout
        self.sequence = sequence
        self._forms: dict[Hashable, Any] = {}

    @cached_property
    def native(self) -> NativeLayout:
        """The layout for the compiled CPU kernel."""
        return NativeLayout(self.layout)

    @cached_property
    def longest_context(self) -> int:
        """The most tokens that any token attends to without a window, itself included."""
        prefixes = (self.layout.prefix_spans(begin) for begin, _ in self.layout.segments)
        return max(
            sum(last - first for first, last in (*spans, segment))
            for spans, segment in zip(prefixes, self.layout.segments, strict=True)
        )

    def bucketed(self, heads: int, kv_heads: int) -> BucketedLayout:
        """Returns the layout for batched products with these numbers of query heads and key
        heads."""

        def build() -> BucketedLayout:
            return BucketedLayout(length_buckets(self.layout.segments), self.layout.size, heads, kv_heads)

        return self.once(("bucketed", heads, kv_heads), build)

    def once(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """Returns the form of the layout with this key, which is built the first time."""
        if key not in self._forms:
            self._forms[key] = build()
        form: _T = self._forms[key]
        return form


# A plain global suffices, since only one thread at a time computes a micro-batch. A ContextVar
# would be wrong: autograd runs the backward pass on CUDA in a thread of its own, which has a
# different context, so activations would be recomputed there as if the row weren't packed.
_current: CurrentRow | None = None


@contextmanager
def computing(layout: Layout | None, sequence: SequencePart = WHOLE) -> Iterator[None]:
    """Declares the layout of the row whose forward and backward passes run inside, and the part of
    it that this rank has.

    None declares that the batch isn't packed.
    """
    global _current
    previous, _current = _current, None if layout is None else CurrentRow(layout, sequence)
    try:
        yield
    finally:
        _current = previous


def current() -> CurrentRow | None:
    """Returns the row that is being computed, or None if the batch isn't packed."""
    return _current


def required() -> CurrentRow:
    """Returns the row that is being computed. Raises RuntimeError outside of `computing`."""
    if _current is None:
        raise RuntimeError("attention over a packed row was called outside of packed_row.computing")
    return _current
