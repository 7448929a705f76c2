"""Computes attention over a packed row in bfloat16 with the compiled kernel (attention_avx512.cpp).

Scores are float32, and the softmax is rounded to 16 bits before it is multiplied by anything, so
results are rounded as in `attention_matmul`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from finetune_trainer.data.batching.packed_layout import Layout, SharedBlock
from finetune_trainer.kernels import kernel_build
from finetune_trainer.kernels.attention_inputs import AttentionInputs

_MAX_HEAD_SIZE = 256


def supports(query: Tensor, key: Tensor) -> bool:
    """Returns whether the kernel is available here and can compute attention for these tensors.

    Both have the shape (…, heads, length, size).
    """
    size = query.shape[-1]
    fits = query.dtype == torch.bfloat16 and size % 16 == 0 and size <= _MAX_HEAD_SIZE
    return fits and query.shape[-3] % key.shape[-3] == 0 and kernel_build.library()[0] is not None


def choice(autocast: torch.dtype | None) -> tuple[str, str]:
    """Returns (how attention over a packed row is computed on the CPU, the reason).

    Whether a model's heads fit the kernel is checked only when attention is computed.
    """
    if autocast != torch.bfloat16:
        return "batched products", "the kernel computes bfloat16 only"
    library, reason = kernel_build.library()
    return ("kernel" if library else "batched products"), reason


@dataclass(frozen=True)
class NativeLayout:
    """Describes a packed row's layout in the form that the kernel reads."""

    layout: Layout

    def forward(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Computes attention from tensors of the shape (length, heads, size).

        Returns the attention in the shape of the query, and the logarithm of the softmax
        denominators, (length, heads) in float32. Raises ValueError if the row and its layout differ
        in length.
        """
        problem = self._problem(inputs)
        out = torch.empty(inputs.query.shape, dtype=inputs.query.dtype)
        log_sums = torch.empty(inputs.query.shape[:2], dtype=torch.float32)
        q, k, v = (_with_adjacent_pairs(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
        _library().finetune_attend(
            ctypes.byref(problem), _tensor(q), _tensor(k), _tensor(v), _pointer(out), _pointer(log_sums)
        )  # fmt: skip
        return out, log_sums

    def backward(
        self, inputs: AttentionInputs, gradient: Tensor, out: Tensor, log_sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of query, key and value. `out` and `log_sums` are what `forward`
        returned."""
        problem = self._problem(inputs)
        query, key, value = inputs.query, inputs.key, inputs.value
        operands = tuple(_with_adjacent_pairs(tensor) for tensor in (gradient, query, key, value, out))
        gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        parts = _library().finetune_attend_parts(ctypes.byref(problem))
        workspace = torch.empty((2, parts, key.shape[1], key.shape[0], key.shape[2]), dtype=torch.float32)
        _library().finetune_attend_backward(
            ctypes.byref(problem), *map(_tensor, operands), _pointer(log_sums), _pointer(workspace),
            *map(_tensor, gradients),
        )  # fmt: skip
        return gradients

    def _problem(self, inputs: AttentionInputs) -> _Problem:
        length, heads, size = inputs.query.shape
        if length != self.layout.size:
            raise ValueError(f"the row has {length} tokens, but its layout has {self.layout.size}")
        segments, first_range, ranges, group_starts = self._arrays
        return _Problem(
            length, heads, inputs.key.shape[1], size, len(segments) // 2, len(group_starts) - 1,
            torch.get_num_threads(), inputs.scale, segments, first_range, ranges, group_starts,
        )  # fmt: skip

    @cached_property
    def _arrays(self) -> tuple[ctypes.Array[ctypes.c_int32], ...]:
        segments = sorted(segment for segment in self.layout.segments if segment[1] > segment[0])
        ranges = [self.layout.prefix_spans(begin) for begin, _ in segments]
        first_range = [0]
        for visible in ranges:
            first_range.append(first_range[-1] + len(visible))
        flat_segments = [position for segment in segments for position in segment]
        flat_ranges = [position for visible in ranges for pair in visible for position in pair]
        arrays = flat_segments, first_range, flat_ranges, group_starts(segments, self.layout.blocks)
        return tuple((ctypes.c_int32 * len(array))(*array) for array in arrays)


def group_starts(segments: Sequence[tuple[int, int]], blocks: Sequence[SharedBlock]) -> list[int]:
    """Returns the index of the first segment of each group, followed by the number of segments.

    A group starts at a segment that attends to no segment before it. No segment attends to another
    group, so each group is computed independently of all others. `segments` must be in ascending
    order.
    """
    spans = sorted((block.begin, block.last) for block in blocks)
    starts, group_end, next_span = [], 0, 0
    for index, (begin, end) in enumerate(segments):
        if begin >= group_end:
            starts.append(index)
        group_end = max(group_end, end)
        while next_span < len(spans) and spans[next_span][0] < end:
            group_end = max(group_end, spans[next_span][1])
            next_span += 1
    return [*starts, len(segments)]


class _Problem(ctypes.Structure):
    """Mirrors `Problem` of attention_avx512.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("tokens", "heads", "kv_heads", "size", "segment_count", "group_count", "threads")
        ),
        ("scale", ctypes.c_float),
        *((name, ctypes.POINTER(ctypes.c_int32)) for name in ("segments", "first_range", "ranges", "groups")),
    )


class _Tensor(ctypes.Structure):
    """Mirrors `Tensor` of attention_avx512.cpp: bfloat16 data, and the strides of its tokens and
    heads in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("by_token", ctypes.c_int64), ("by_head", ctypes.c_int64))


def _tensor(tensor: Tensor) -> _Tensor:
    return _Tensor(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _with_adjacent_pairs(tensor: Tensor) -> Tensor:
    """Returns the tensor, copied unless each head's elements are contiguous and can be read as
    aligned pairs."""
    adjacent = tensor.stride(2) == 1 and tensor.stride(0) % 2 == 0 and tensor.stride(1) % 2 == 0
    return tensor if adjacent and tensor.data_ptr() % 4 == 0 else tensor.contiguous()


def _library() -> ctypes.CDLL:
    library, reason = kernel_build.library()
    if library is None:
        raise RuntimeError(reason)
    return library
