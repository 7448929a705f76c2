"""A fake of ATen's flash attention for sequences of different lengths, which exists on CUDA only.

It computes on the CPU what FlashAttention-2 defines, with causal masks and windows aligned to the
last key of each sequence, and raises for whatever `mha_varlen_fwd` and `mha_varlen_bwd` of
PyTorch's flash_api.cpp refuse. It also raises for borders that don't fit the tensors, which the
kernel would follow into other memory. The backward pass uses the output and the softmax
denominators that it is given, as the kernel does, and rounds the gradients of grouped keys before
it sums them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


@dataclass
class FakeFlash:
    """Records the calls. With `exact`, float64 is admitted too, so that what surrounds the kernel
    can be tested without rounding; the kernel itself would refuse it."""

    exact: bool = False
    forward_calls: int = 0
    gathered_keys: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None,
        max_q: int, max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *,
        scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
        **unused: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert not any(value is not None for value in unused.values()), "the fake doesn't know these arguments"
        assert dropout_p == 0
        assert not return_debug_mask
        _require(cum_seq_q is not None and cum_seq_k is not None, "the fake knows sequences only")
        self._check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
        self.forward_calls += 1
        self.gathered_keys.append(len(key))
        self.windows.append(-1 if window_size_left is None else window_size_left)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = torch.empty_like(query)
        log_sums = torch.empty(query.shape[1], query.shape[0], dtype=self._sums_dtype(query))
        for part in _sequences(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, window_size_left, window_size_right):
            scores = part.scores(query, key, scale)
            log_sum = torch.logsumexp(scores, -1)
            attended = (scores - log_sum[..., None]).exp() @ part.keys(value, query.shape[1])
            out[part.queries] = attended.transpose(0, 1).to(out.dtype)
            log_sums[:, part.queries] = log_sum.to(log_sums.dtype)
        random = torch.empty(2, dtype=torch.uint64)
        return out, log_sums, random, random.new_empty(()), query.new_empty(0)

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
        rng_state: Tensor, unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert dropout_p == 0
        self._check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
        for name, tensor in (("out", out), ("dout", grad_out)):
            _require(tensor.dtype == query.dtype, f"query and {name} must have the same dtype")
            _require(tensor.stride(-1) == 1, f"{name} tensor must have contiguous last dimension")
            _require(tensor.shape == query.shape, f"{name} must have the shape of query")
        _require(logsumexp.shape == (query.shape[1], query.shape[0]), "logsumexp must be (heads, tokens)")
        _require(logsumexp.dtype == self._sums_dtype(query), "logsumexp must be float32")
        _require(logsumexp.is_contiguous(), "logsumexp must be contiguous")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        heads = query.shape[1]
        by_query = torch.empty_like(query)
        by_key, by_value = (t.new_empty(t.shape[0], heads, t.shape[2]) for t in (key, value))
        for part in _sequences(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, window_size_left, window_size_right):
            q, k, v = part.own(query), part.keys(key, heads), part.keys(value, heads)
            d_out = part.own(grad_out)
            probability = (part.scores(query, key, scale) - logsumexp[:, part.queries, None].double()).exp()
            inner = (d_out * part.own(out)).sum(-1, keepdim=True)
            d_scores = probability * (d_out @ v.transpose(1, 2) - inner) * scale
            by_query[part.queries] = (d_scores @ k).transpose(0, 1).to(query.dtype)
            by_key[part.columns] = (d_scores.transpose(1, 2) @ q).transpose(0, 1).to(key.dtype)
            by_value[part.columns] = (probability.transpose(1, 2) @ d_out).transpose(0, 1).to(value.dtype)
        by_key, by_value = (
            t.unflatten(1, (key.shape[1], -1)).double().sum(2).to(key.dtype) for t in (by_key, by_value)
        )
        return by_query, by_key, by_value

    def _sums_dtype(self, query: Tensor) -> torch.dtype:
        return torch.float64 if query.dtype == torch.float64 else torch.float32

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int
    ) -> None:
        admitted = (*_HALF, torch.float64) if self.exact else _HALF
        _require(query.dtype in admitted, "FlashAttention only support fp16 and bf16 data type")
        _require(key.dtype == query.dtype, "query and key must have the same dtype")
        _require(value.dtype == query.dtype, "query and value must have the same dtype")
        for name, borders in (("cu_seqlens_q", cum_q), ("cu_seqlens_k", cum_k)):
            _require(borders.dtype == torch.int32, f"{name} must have dtype int32")
            _require(borders.is_contiguous(), f"{name} must be contiguous")
        for tensor in (query, key, value):
            _require(tensor.dim() == 3, "tensors must be (tokens, heads, size)")
            _require(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        heads, size = query.shape[1:]
        _require(size <= 256, "FlashAttention forward only supports head dimension at most 256")
        _require(heads % key.shape[1] == 0, "Number of heads in key/value must divide number of heads in query")
        _require(size % 8 == 0, "head_size must be a multiple of 8, this is ensured by padding!")
        _require(key.shape == value.shape and key.shape[2] == size, "key and value must have the size of query")
        _require(cum_q.shape == cum_k.shape and cum_q.numel() > 1, "batch size must be positive")
        for borders, tensor, longest in ((cum_q, query, max_q), (cum_k, key, max_k)):
            lengths = borders.diff()
            _require(int(borders[0]) == 0 and int(borders[-1]) == len(tensor), "borders must cover the tensor")
            _require(bool((lengths > 0).all()), "borders must ascend")
            _require(int(lengths.max()) <= longest, "a sequence is longer than the stated maximum")


@contextmanager
def installed(*, exact: bool = False) -> Iterator[FakeFlash]:
    """Registers the fake for tensors on the CPU. PyTorch checks each call against the operators'
    real signatures."""
    fake = FakeFlash(exact)
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", fake.forward, "CPU")
        library.impl("_flash_attention_backward", fake.backward, "CPU")
        yield fake
    finally:
        library._destroy()


@dataclass(frozen=True)
class _Sequence:
    queries: slice
    columns: slice
    visible: Tensor

    def own(self, tensor: Tensor) -> Tensor:
        return tensor[self.queries].transpose(0, 1).double()

    def keys(self, tensor: Tensor, heads: int) -> Tensor:
        return tensor[self.columns].transpose(0, 1).double().repeat_interleave(heads // tensor.shape[1], dim=0)

    def scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        scores = self.own(query) @ self.keys(key, query.shape[1]).transpose(1, 2) * scale
        return scores.masked_fill(~self.visible, float("-inf"))


def _sequences(
    cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, is_causal: bool, left: int | None, right: int | None
) -> Iterator[_Sequence]:
    left, right = (-1 if side is None else side for side in (left, right))
    if max_q == 1:
        is_causal = False
    if is_causal:
        right = 0
    left, right = (-1 if side >= max_k else side for side in (left, right))
    borders_q, borders_k = cum_q.tolist(), cum_k.tolist()
    for index in range(len(borders_q) - 1):
        queries = slice(borders_q[index], borders_q[index + 1])
        columns = slice(borders_k[index], borders_k[index + 1])
        n, m = queries.stop - queries.start, columns.stop - columns.start
        diagonal = torch.arange(n)[:, None] + (m - n)
        visible = torch.ones(n, m, dtype=torch.bool)
        if right >= 0:
            visible &= torch.arange(m)[None] <= diagonal + right
        if left >= 0:
            visible &= torch.arange(m)[None] >= diagonal - left
        yield _Sequence(queries, columns, visible)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
