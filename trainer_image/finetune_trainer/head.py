"""The output head and its loss in one: the logits of a few positions at a time, never all of them.

The gradient of a sum of -log p by the logits is p minus one at the target, known as soon as p is (as in Liger's and
Apple's fused cross-entropies); so each chunk's logits live only while its share of the loss and of the gradient is
taken. Put on and used by `loss`, tried by `packing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer import layout

# Of logits, in the products' format: large enough for them. Their softmax is taken of fewer at a time, in float32.
_CHUNK_BYTES = {"cpu": 25 * 2**20, "cuda": 2**25}
_SOFTMAX_BYTES = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class Wanted:
    """`targets[i]` is predicted at the head's input position `chosen[i]`. `each` gets every target's own loss."""

    targets: Tensor
    chosen: Tensor
    autocast: torch.dtype | None
    each: Tensor | None = None
    apiece: bool = False  # -log p of each target, not their sum


class Head:
    """Stands before a model's output layer. Inside `computing`, the layer returns the loss in place of logits."""

    def __init__(self, layer: Any) -> None:
        self._wanted: Wanted | None = None
        self._plain = layer.forward
        self._layer = layer
        layer.forward = self._forward

    @contextmanager
    def computing(self, wanted: Wanted) -> Iterator[None]:
        self._wanted = wanted
        try:
            yield
        finally:
            self._wanted = None

    def _forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if self._wanted is None:
            return self._plain(hidden, *arguments, **options)  # type: ignore[no-any-return]
        wanted = self._wanted
        flat = hidden.reshape(-1, hidden.shape[-1])
        if wanted.apiece:
            return _apiece(flat, self._layer.weight, self._layer.bias, wanted).reshape(1, 1, -1)
        loss: Tensor = _LossSum.apply(flat, self._layer.weight, self._layer.bias, wanted)  # type: ignore[no-untyped-call]
        return loss.reshape(1, 1, 1)


def layer_of(base: Any) -> Any:
    """The model's output layer; where it is trained whole beside an adapter, the copy that learns."""
    layer = base.get_output_embeddings()
    return getattr(layer, "modules_to_save", {"default": layer})["default"]


def fits(base: Any) -> bool:
    """Whether the model's output layer is a plain matrix that can be stood before."""
    return type(layer_of(base)) is torch.nn.Linear


def slices(positions: int, each: int, most: int, grain: int = 1) -> list[slice]:
    """Few equal parts, about `most` bytes each, `each` bytes a position; all but the last are a multiple of `grain`."""
    count = max(1, -(-positions * each // most))
    size = max(1, -(-positions // (count * grain))) * grain
    return [slice(begin, min(begin + size, positions)) for begin in range(0, positions, size)]


def _apiece(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted) -> Tensor:
    """-log p of each target. What weighs in its gradient is only known later, so logits are computed again then."""
    from torch.utils.checkpoint import checkpoint

    kind = wanted.autocast or hidden.dtype

    def some(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logits = functional.linear(hidden.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
        exact = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(exact, targets, reduction="none")

    parts = [
        checkpoint(some, hidden[wanted.chosen[part]], weight, bias, wanted.targets[part], use_reentrant=False,
                   preserve_rng_state=False)
        for part in slices(len(wanted.chosen), 4 * len(weight), _CHUNK_BYTES[hidden.device.type])
    ]  # fmt: skip
    return torch.cat(parts)


class _LossSum(torch.autograd.Function):
    """(positions, width), (vocabulary, width) → sum of -log p in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted) -> Tensor:
        kind = wanted.autocast or hidden.dtype
        inputs, matrix = hidden.to(kind), weight.to(kind)
        exact = torch.float64 if kind == torch.float64 else torch.float32
        by_hidden, by_weight, by_bias = (ctx.needs_input_grad[place] for place in range(3))
        d_weight = torch.zeros_like(weight, dtype=exact) if by_weight else None
        d_bias = torch.zeros_like(bias, dtype=exact) if by_bias and bias is not None else None
        missing = layout.filled(len(inputs)) - len(inputs)
        if missing and by_hidden:
            inputs = functional.pad(inputs, (0, 0, 0, missing))
        d_hidden = torch.empty_like(inputs) if by_hidden else None
        counts = torch.bincount(wanted.chosen, minlength=len(inputs)).to(exact)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        most, softmax = _CHUNK_BYTES[hidden.device.type], _SOFTMAX_BYTES[hidden.device.type]
        order = torch.argsort(wanted.chosen, stable=True)
        chosen, targets = wanted.chosen[order], wanted.targets[order]
        for part in slices(len(inputs), len(matrix) * matrix.itemsize, most, layout.GRAIN):
            slope = functional.linear(inputs[part], matrix, None if bias is None else bias.to(kind))  # logits, so far
            for few in slices(len(slope), len(matrix) * exact.itemsize, softmax):
                bounds = torch.tensor([part.start + few.start, part.start + few.stop], device=chosen.device)
                first, last = torch.searchsorted(chosen, bounds).tolist()
                at, target = chosen[first:last] - bounds[0], targets[first:last]
                log_p = torch.log_softmax(slope[few], -1, dtype=exact)
                total -= log_p[at, target].sum()
                if wanted.each is not None:
                    wanted.each[order[first:last]] = -log_p[at, target].to(wanted.each.dtype)
                if by_hidden or by_weight or by_bias:
                    p = log_p.exp_().mul_(counts[part][few, None])
                    p.index_put_((at, target), p.new_full((1,), -1.0), accumulate=True)
                    slope[few] = p
            if d_bias is not None:
                d_bias += slope.sum(0, dtype=exact)
            if d_hidden is not None:
                torch.mm(slope, matrix, out=d_hidden[part])
            if d_weight is not None:
                d_weight += slope.t() @ inputs[part]
        ctx.kinds = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(None if d_hidden is None else d_hidden[: len(hidden)], d_weight, d_bias)
        return total.to(torch.float32) if exact == torch.float32 else total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = gradients
        parts = zip(ctx.saved_tensors, ctx.kinds, strict=True)
        return (*(None if part is None else (part * factor).to(kind) for part, kind in parts), None)
