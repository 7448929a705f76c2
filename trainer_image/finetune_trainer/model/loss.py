"""Computes the loss of a micro-batch: the sum of -log p over the supervised tokens.

It is a sum, not a mean, because only the training loop knows how many supervised tokens the global
batch has. The models' own losses are never used: some average over the micro-batch, and some don't.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer.data.batching.collator import Batch
from finetune_trainer.kernels import chunked_cross_entropy, packed_row, padding


@dataclass(frozen=True)
class LossSum:
    """Computes the loss of a batch. `autocast` is the number format of the matrix products, or None
    for that of the weights.

    `selects_positions` means that the model can compute its output layer at selected positions
    only. `head` computes the loss without ever storing all logits; None means that the model
    returns the full logits. `context` returns the context in which a model must be called to
    compute its products in that format; None means torch.autocast.
    """

    selects_positions: bool
    autocast: torch.dtype | None
    device: str
    head: chunked_cross_entropy.ChunkedHead | None = None
    context: Callable[[Any], AbstractContextManager[Any]] | None = None

    @classmethod
    def of(cls, base: Any, autocast: torch.dtype | None, device: str) -> LossSum:
        """Returns the loss of a base model, which is computed in chunks if its output layer can be
        replaced."""
        selects_positions = "logits_to_keep" in inspect.signature(base.forward).parameters
        head = None
        if chunked_cross_entropy.supports(base):
            head = chunked_cross_entropy.ChunkedHead(chunked_cross_entropy.output_layer(base))
        return cls(selects_positions, autocast, device, head)

    @property
    def unchunked(self) -> LossSum:
        """The same loss computed from full logits, for comparison."""
        return replace(self, head=None)

    @contextmanager
    def packed_context(self, batch: Batch) -> Iterator[None]:
        """Declares a batch's layout and padding. Both its forward and its backward pass must run
        inside."""
        with packed_row.computing(batch.layout, batch.sequence), padding.masked(batch.padding):
            yield

    def calling(self, model: Any) -> AbstractContextManager[Any]:
        """Returns the context in which `model` must be called."""
        if self.context is not None:
            return self.context(model)
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)

    def metric_sums(self) -> Tensor:
        """Returns zeros, to which each call adds the sums of its metrics. This loss has no
        metrics."""
        return torch.zeros(0, dtype=torch.float64, device=self.device)

    def __call__(
        self, model: Callable[..., Any], batch: Batch, losses_out: Tensor | None = None,
        metric_sums: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns the loss as a float32 scalar. Call it inside `packed_context(batch)`.

        `losses_out` is filled with the loss of each target, in the order of the targets.
        """
        return self._losses(model, batch, losses_out, per_token=False)

    def per_token(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Returns -log p of each target in float32, or a zero if the batch has no targets.

        Call it inside `packed_context(batch)`.
        """
        return self._losses(model, batch, None, per_token=True)

    def _losses(self, model: Callable[..., Any], batch: Batch, losses_out: Tensor | None, *, per_token: bool) -> Tensor:
        options: dict[str, Any] = {"use_cache": False}
        if batch.keep is not None and self.selects_positions:
            options["logits_to_keep"] = batch.keep
        chosen, positions = self._target_positions(batch)
        empty = batch.targets.numel() == 0
        targets = chunked_cross_entropy.Targets(
            batch.targets, chosen, positions, self.autocast, losses_out, per_token,
            batch.sorted_chosen if chosen is batch.chosen else None,
        )  # fmt: skip
        inside = nullcontext() if self.head is None or empty else self.head.computing(targets)
        with self.calling(model), inside:
            logits = model(**batch.inputs, **options).logits
        if empty:
            return _zero(logits)
        if self.head is not None:
            return logits.reshape(-1) if per_token else logits.sum()  # type: ignore[no-any-return]
        flat = logits.reshape(-1, logits.shape[-1])
        flat = (flat if positions is None else flat.index_select(0, positions)).index_select(0, chosen)
        exact = flat if flat.dtype == torch.float64 else flat.float()
        if losses_out is not None:
            losses_out.copy_(functional.cross_entropy(exact, batch.targets, reduction="none"))
        return functional.cross_entropy(exact, batch.targets, reduction="none" if per_token else "sum")

    def _target_positions(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns the batch's `chosen` and `positions`, relative to the positions that the model
        computes logits for."""
        if batch.keep is None or self.selects_positions:
            return batch.chosen, batch.positions
        if batch.positions is not None:
            return batch.chosen, _full_positions(batch, batch.positions)
        return _full_positions(batch, batch.chosen), None


def _zero(logits: Tensor) -> Tensor:
    """Returns a zero that takes part in the backward pass, whatever the logits are."""
    return logits.float().masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0).sum()


def _full_positions(batch: Batch, selected: Tensor) -> Tensor:
    """Converts indices among the positions in `batch.keep` into indices among all positions of the
    rows."""
    count, length = len(batch.keep), batch.inputs["input_ids"].shape[1]  # type: ignore[arg-type]
    return selected // count * length + batch.keep[selected % count]  # type: ignore[index]
