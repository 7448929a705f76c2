"""Attention over a laid-out row in bfloat16 by the compiled kernel (attention_kernel.cpp). Called by `attention_cpu`.

Scores are float32, the softmax is 16 bits wide where it multiplies: the same roundings as in `attention_products`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from finetune_trainer import kernel_build
from finetune_trainer.layout import Block, Layout

_LARGEST = 256  # elements of a head


def serves(query: Tensor, key: Tensor) -> bool:
    """(…, heads, length, size) each."""
    size = query.shape[-1]
    fits = query.dtype == torch.bfloat16 and size % 16 == 0 and size <= _LARGEST
    return fits and query.shape[-3] % key.shape[-3] == 0 and kernel_build.library()[0] is not None


def choice(autocast: torch.dtype | None) -> tuple[str, str]:
    """(how a packed row's attention is computed on the CPU, why). Whether a model's heads fit shows as it runs."""
    if autocast != torch.bfloat16:
        return "batched products", "the kernel computes bfloat16 only"
    found, reason = kernel_build.library()
    return ("kernel" if found else "batched products"), reason


@dataclass(frozen=True)
class Row:
    """A layout as the kernel reads it."""

    layout: Layout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(length, heads, size) each → the same, and the log of the sums (length, heads) in float32."""
        problem = self._problem(query, key, scale)
        out = torch.empty(query.shape, dtype=query.dtype)
        sums = torch.empty(query.shape[:2], dtype=torch.float32)
        q, k, v = (_by_size(tensor) for tensor in (query, key, value))
        _library().finetune_attend(
            ctypes.byref(problem), _tensor(q), _tensor(k), _tensor(v), _place(out), _place(sums)
        )  # fmt: skip
        return out, sums

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        problem = self._problem(query, key, scale)
        given = tuple(_by_size(tensor) for tensor in (gradient, query, key, value, out))
        found = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        parts = _library().finetune_attend_parts(ctypes.byref(problem))
        room = torch.empty((2, parts, key.shape[1], key.shape[0], key.shape[2]), dtype=torch.float32)
        _library().finetune_attend_backward(
            ctypes.byref(problem), *map(_tensor, given), _place(sums), _place(room), *map(_tensor, found)
        )  # fmt: skip
        return found

    def _problem(self, query: Tensor, key: Tensor, scale: float) -> _Problem:
        length, heads, size = query.shape
        if length != self.layout.size:
            raise ValueError(f"a row of {length} tokens, laid out as {self.layout.size}")
        pieces, first_seen, seen, groups = self._arrays
        return _Problem(
            length, heads, key.shape[1], size, len(pieces) // 2, len(groups) - 1, torch.get_num_threads(), scale,
            pieces, first_seen, seen, groups,
        )  # fmt: skip

    @cached_property
    def _arrays(self) -> tuple[ctypes.Array[ctypes.c_int32], ...]:
        pieces = sorted(piece for piece in self.layout.pieces if piece[1] > piece[0])
        seen = [self.layout.seen_by(begin) for begin, _ in pieces]
        firsts = [0]
        for ranges in seen:
            firsts.append(firsts[-1] + len(ranges))
        flat = [number for ranges in seen for pair in ranges for number in pair]
        return tuple(
            (ctypes.c_int32 * len(numbers))(*numbers)
            for numbers in ([n for piece in pieces for n in piece], firsts, flat, groups(pieces, self.layout.blocks))
        )


def groups(pieces: Sequence[tuple[int, int]], blocks: Sequence[Block]) -> list[int]:
    """Where pieces that see nothing of those before them begin (indices), and their number. `pieces` rise."""
    spans = sorted((block.begin, block.last) for block in blocks)
    starts, reach, at = [], 0, 0
    for index, (begin, end) in enumerate(pieces):
        if begin >= reach:
            starts.append(index)
        reach = max(reach, end)
        while at < len(spans) and spans[at][0] < end:
            reach = max(reach, spans[at][1])
            at += 1
    return [*starts, len(pieces)]


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "heads", "kv", "size", "pieces", "groups", "threads")),
        ("scale", ctypes.c_float),
        *((name, ctypes.POINTER(ctypes.c_int32)) for name in ("piece", "first_seen", "seen", "group")),
    )


class _Tensor(ctypes.Structure):
    """bfloat16, and how far its tokens and heads lie apart."""

    _fields_ = (("data", ctypes.c_void_p), ("by_token", ctypes.c_int64), ("by_head", ctypes.c_int64))


def _tensor(tensor: Tensor) -> _Tensor:
    return _Tensor(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _place(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _by_size(tensor: Tensor) -> Tensor:
    """With a head's elements in a row, as pairs."""
    fine = tensor.stride(2) == 1 and tensor.stride(0) % 2 == 0 and tensor.stride(1) % 2 == 0
    return tensor if fine and tensor.data_ptr() % 4 == 0 else tensor.contiguous()


def _library() -> ctypes.CDLL:
    found, why = kernel_build.library()
    if found is None:
        raise RuntimeError(why)
    return found
