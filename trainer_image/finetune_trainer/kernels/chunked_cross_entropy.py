"""Computes the output layer and its loss together, with the logits of a few positions at a time and
never of all of them.

The gradient of a sum of -log p with respect to the logits is p, minus one at the target, and is
known as soon as p is (as in the fused cross-entropies of Liger Kernel and of Apple's Cut
Cross-Entropy). The logits of a chunk therefore exist only until its contributions to the loss and
to the gradients are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from finetune_trainer.data.batching import packed_layout
from finetune_trainer.kernels.cuda import softmax
from finetune_trainer.kernels.sizes import CHUNK_BYTES, PER_TOKEN_BYTES, SOFTMAX_BYTES, UNFUSED_CHUNK_BYTES


@dataclass(frozen=True)
class Targets:
    """Describes what the output layer predicts: `targets[i]` at the position `chosen[i]`.

    `chosen` are indices into the positions that enter the output layer, or into `positions` if that
    is given. If `losses_out` is given, it is filled with the loss of every target. With
    `per_token`, the layer returns the loss of every target instead of their sum. `sorted_chosen`
    are the values of `chosen` in ascending order; without them, the host asks the device once.
    """

    targets: Tensor
    chosen: Tensor
    positions: Tensor | None
    autocast: torch.dtype | None
    losses_out: Tensor | None = None
    per_token: bool = False
    sorted_chosen: NDArray[np.int64] | None = None


class ChunkedHead:
    """Replaces the forward pass of a model's output layer. Inside `computing`, the layer returns
    the loss instead of logits."""

    def __init__(self, layer: Any) -> None:
        self._targets: Targets | None = None
        self._original_forward = layer.forward
        self._layer = layer
        layer.forward = self._forward

    @contextmanager
    def computing(self, targets: Targets) -> Iterator[None]:
        """Makes the layer return the loss of `targets` inside.

        The loss has the shape (1, 1, 1), or (1, 1, targets) if it is per token.
        """
        self._targets = targets
        try:
            yield
        finally:
            self._targets = None

    def _forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        targets = self._targets
        if targets is None:
            return self._original_forward(hidden, *arguments, **options)  # type: ignore[no-any-return]
        flat = hidden.reshape(-1, hidden.shape[-1])
        if targets.positions is not None:
            flat = flat.index_select(0, targets.positions)
        if targets.per_token:
            return _per_token(flat, self._layer.weight, self._layer.bias, targets).reshape(1, 1, -1)
        loss: Tensor = _LossSum.apply(flat, self._layer.weight, self._layer.bias, targets)  # type: ignore[no-untyped-call]
        return loss.reshape(1, 1, 1)


def output_layer(base: Any) -> Any:
    """Returns the model's output layer. If an adapter trains a full copy of it, the copy is
    returned."""
    layer = base.get_output_embeddings()
    return getattr(layer, "modules_to_save", {"default": layer})["default"]


def supports(base: Any) -> bool:
    """Returns whether the model's output layer is a plain linear layer, which `ChunkedHead` can
    replace."""
    return type(output_layer(base)) is torch.nn.Linear


def slices(positions: int, position_bytes: int, limit: int, grain: int = 1) -> list[slice]:
    """Divides `positions` of `position_bytes` each into few equal parts of about `limit` bytes.

    The sizes of all parts except the last are multiples of `grain`.
    """
    count = max(1, -(-positions * position_bytes // limit))
    size = max(1, -(-positions // (count * grain))) * grain
    return [slice(begin, min(begin + size, positions)) for begin in range(0, positions, size)]


def _per_token(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets) -> Tensor:
    """Returns -log p of each target.

    The factors of its gradient are known only in the backward pass, which therefore computes the
    logits again.
    """
    from torch.utils.checkpoint import checkpoint

    dtype = targets.autocast or hidden.dtype

    def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        logits = functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        exact = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(exact, labels, reduction="none")

    parts = [
        checkpoint(losses, hidden[targets.chosen[part]], weight, bias, targets.targets[part], use_reentrant=False,
                   preserve_rng_state=False)
        for part in slices(len(targets.chosen), 4 * len(weight), PER_TOKEN_BYTES[hidden.device.type])
    ]  # fmt: skip
    return torch.cat(parts)


@dataclass(frozen=True)
class _Labels:
    """Holds the targets in the order of the positions at which they are predicted.

    `order` are their indices before sorting, and `bounds` their positions on the host.
    """

    order: Tensor
    positions: Tensor
    targets: Tensor
    bounds: NDArray[np.int64]

    @classmethod
    def of(cls, targets: Targets) -> _Labels:
        order = torch.argsort(targets.chosen, stable=True)
        positions = targets.chosen[order]
        bounds = positions.cpu().numpy() if targets.sorted_chosen is None else targets.sorted_chosen
        return cls(order, positions, targets.targets[order], bounds)

    def within(self, begin: int, end: int) -> slice:
        """Returns the indices of the targets that are predicted at the positions from `begin` to
        `end`."""
        return slice(*(int(index) for index in np.searchsorted(self.bounds, [begin, end])))

    def repetitions(self, vocabulary: int) -> Tensor:
        """Returns, for each target, how often it is predicted at its position, in float32."""
        keys = self.positions * vocabulary + self.targets
        ordered = torch.argsort(keys)
        changes = torch.diff(keys[ordered], prepend=keys[ordered[:1]]) != 0
        group = torch.empty_like(ordered)
        group[ordered] = torch.cumsum(changes, 0)
        ones = torch.ones(len(keys), device=keys.device)
        return torch.zeros_like(ones).index_add_(0, group, ones)[group]


@dataclass(frozen=True)
class _Chunk:
    """Holds the logits of a chunk, which begins at the position `begin`.

    `counts` are the numbers of targets at its positions, `total` is the sum of the losses so far.
    """

    logits: Tensor
    begin: int
    counts: Tensor
    total: Tensor
    losses_out: Tensor | None
    differentiates: bool

    def add(self, labels: _Labels, part: slice, log_p: Tensor) -> None:
        """Adds the losses of the targets in `part`."""
        self.total.sub_(log_p.sum())
        if self.losses_out is not None:
            self.losses_out[labels.order[part]] = -log_p.to(self.losses_out.dtype)

    def differentiate(self, labels: _Labels) -> None:
        """Adds the losses, and replaces the logits with their gradients."""
        exact = self.total.dtype
        size, limit = self.logits.shape[1] * exact.itemsize, SOFTMAX_BYTES[self.logits.device.type]
        for part in slices(len(self.logits), size, limit):
            begin = self.begin + part.start
            inside = labels.within(begin, self.begin + part.stop)
            row, label = labels.positions[inside] - begin, labels.targets[inside]
            log_p = torch.log_softmax(self.logits[part], -1, dtype=exact)
            self.add(labels, inside, log_p[row, label])
            if self.differentiates:
                p = log_p.exp_().mul_(self.counts[part, None])
                p.index_put_((row, label), p.new_full((1,), -1.0), accumulate=True)
                self.logits[part] = p

    def differentiate_fused(self, labels: _Labels, repetitions: Tensor) -> None:
        """Does the same in one kernel, whose results at the targets are computed again: the
        difference between p and 1 is too small for the format of the logits."""
        inside = labels.within(self.begin, self.begin + len(self.logits))
        row, label = labels.positions[inside] - self.begin, labels.targets[inside]
        target_logits = self.logits[row, label].to(torch.float32)
        log_sums = softmax.softmax_gradient_(self.logits, self.counts, self.differentiates)
        log_p = target_logits - log_sums[row]
        self.add(labels, inside, log_p)
        if self.differentiates:
            p = log_p.exp().mul_(self.counts[row]).sub_(repetitions[inside])
            self.logits.index_put_((row, label), p.to(self.logits.dtype))


class _LossSum(torch.autograd.Function):
    """Computes the sum of -log p from hidden states (positions, width) and a weight (vocabulary,
    width).

    The sum is float32, or float64 if the matrix products are.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets) -> Tensor:
        dtype, device = targets.autocast or hidden.dtype, hidden.device
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        by_hidden, by_weight, by_bias = (ctx.needs_input_grad[index] for index in range(3))
        d_weight = torch.zeros_like(weight, dtype=exact) if by_weight else None
        d_bias = torch.zeros_like(bias, dtype=exact) if by_bias and bias is not None else None
        grain = packed_layout.grain(device.type)
        missing = packed_layout.rounded_up(len(inputs), grain) - len(inputs)
        if missing and by_hidden:
            inputs = functional.pad(inputs, (0, 0, 0, missing))
        d_hidden = torch.empty_like(inputs) if by_hidden else None
        total = torch.zeros((), dtype=exact, device=device)
        ones = torch.ones(len(targets.chosen), dtype=exact, device=device)
        counts = torch.zeros(len(inputs), dtype=exact, device=device).index_add_(0, targets.chosen, ones)
        labels = _Labels.of(targets)
        repetitions = labels.repetitions(len(matrix)) if softmax.supports(device, dtype) else None
        differentiates = by_hidden or by_weight or by_bias
        limit = (UNFUSED_CHUNK_BYTES if repetitions is None else CHUNK_BYTES)[device.type]
        for part in slices(len(inputs), len(matrix) * matrix.itemsize, limit, grain):
            logits = functional.linear(inputs[part], matrix, None if bias is None else bias.to(dtype))
            chunk = _Chunk(logits, part.start, counts[part], total, targets.losses_out, differentiates)
            if repetitions is None:
                chunk.differentiate(labels)
            else:
                chunk.differentiate_fused(labels, repetitions)
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=exact)
            if d_hidden is not None:
                torch.mm(logits, matrix, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, logits.t(), inputs[part])
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(None if d_hidden is None else d_hidden[: len(hidden)], d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Multiplies the gradients in place. A second backward pass through the same loss is an
        error."""
        (factor,) = gradients
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if part is None else part.mul_(factor).to(dtype) for part, dtype in parts), None)


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Adds the product of two matrices to `total`, without storing it if the device can."""
    if softmax.accumulates_products(total.device.type, first.dtype):
        torch.addmm(total, first, second, out_dtype=torch.float32, out=total)
    else:
        total += first @ second
