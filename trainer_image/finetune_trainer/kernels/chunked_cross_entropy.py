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

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer.data.batching import packed_layout
from finetune_trainer.kernels.sizes import CHUNK_BYTES, SOFTMAX_BYTES


@dataclass(frozen=True)
class Targets:
    """Describes what the output layer predicts: `targets[i]` at the position `chosen[i]`.

    `chosen` are indices into the positions that enter the output layer, or into `positions` if that
    is given. If `losses_out` is given, it is filled with the loss of every target. With
    `per_token`, the layer returns the loss of every target instead of their sum.
    """

    targets: Tensor
    chosen: Tensor
    positions: Tensor | None
    autocast: torch.dtype | None
    losses_out: Tensor | None = None
    per_token: bool = False


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
        for part in slices(len(targets.chosen), 4 * len(weight), CHUNK_BYTES[hidden.device.type])
    ]  # fmt: skip
    return torch.cat(parts)


class _LossSum(torch.autograd.Function):
    """Computes the sum of -log p from hidden states (positions, width) and a weight (vocabulary,
    width).

    The sum is float32, or float64 if the matrix products are.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets) -> Tensor:
        dtype = targets.autocast or hidden.dtype
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        by_hidden, by_weight, by_bias = (ctx.needs_input_grad[index] for index in range(3))
        d_weight = torch.zeros_like(weight, dtype=exact) if by_weight else None
        d_bias = torch.zeros_like(bias, dtype=exact) if by_bias and bias is not None else None
        missing = packed_layout.rounded_up(len(inputs)) - len(inputs)
        if missing and by_hidden:
            inputs = functional.pad(inputs, (0, 0, 0, missing))
        d_hidden = torch.empty_like(inputs) if by_hidden else None
        counts = torch.bincount(targets.chosen, minlength=len(inputs)).to(exact)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        chunk_bytes, softmax_bytes = CHUNK_BYTES[hidden.device.type], SOFTMAX_BYTES[hidden.device.type]
        order = torch.argsort(targets.chosen, stable=True)
        chosen, labels = targets.chosen[order], targets.targets[order]
        for chunk in slices(len(inputs), len(matrix) * matrix.itemsize, chunk_bytes, packed_layout.GRAIN):
            logits = functional.linear(inputs[chunk], matrix, None if bias is None else bias.to(dtype))
            for part in slices(len(logits), len(matrix) * exact.itemsize, softmax_bytes):
                bounds = torch.tensor([chunk.start + part.start, chunk.start + part.stop], device=chosen.device)
                first, last = torch.searchsorted(chosen, bounds).tolist()
                row, label = chosen[first:last] - bounds[0], labels[first:last]
                log_p = torch.log_softmax(logits[part], -1, dtype=exact)
                total -= log_p[row, label].sum()
                if targets.losses_out is not None:
                    targets.losses_out[order[first:last]] = -log_p[row, label].to(targets.losses_out.dtype)
                if by_hidden or by_weight or by_bias:
                    p = log_p.exp_().mul_(counts[chunk][part, None])
                    p.index_put_((row, label), p.new_full((1,), -1.0), accumulate=True)
                    logits[part] = p
            d_logits = logits  # every part was overwritten by its gradient
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=exact)
            if d_hidden is not None:
                torch.mm(d_logits, matrix, out=d_hidden[chunk])
            if d_weight is not None:
                d_weight += d_logits.t() @ inputs[chunk]
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(None if d_hidden is None else d_hidden[: len(hidden)], d_weight, d_bias)
        return total.to(torch.float32) if exact == torch.float32 else total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = gradients
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if part is None else (part * factor).to(dtype) for part, dtype in parts), None)
