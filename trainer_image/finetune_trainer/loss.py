"""The loss of a micro-batch: the sum of -log p over its learnt tokens. Called by the loop and by evaluation.

A sum, not a mean: only the loop knows how many tokens the whole global batch has. Models' own losses are never used
(some average over the micro-batch, some don't).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer import documents, head
from finetune_trainer.batch import Batch


@dataclass(frozen=True)
class LossSum:
    """`keeps_logits`: the model can compute its head at some positions only. `head` computes the loss without ever
    holding all logits; None: the model's logits are taken whole."""

    keeps_logits: bool
    autocast: torch.dtype | None
    device: str
    head: head.Head | None = None

    @classmethod
    def of(cls, base: Any, autocast: torch.dtype | None, device: str) -> LossSum:
        """Asks the base model's forward what it understands."""
        keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
        return cls(keeps, autocast, device, head.Head(head.layer_of(base)) if head.fits(base) else None)

    @property
    def plain(self) -> LossSum:
        """The same by whole logits, to compare with."""
        return replace(self, head=None)

    @contextmanager
    def room(self, batch: Batch) -> Iterator[None]:
        """Forward and backward of a batch both happen in here."""
        with documents.apart(batch.layout):
            yield

    def tally(self) -> Tensor:
        """Zeros to which calls add the figures of what they computed. Here there are none."""
        return torch.zeros(0, dtype=torch.float64, device=self.device)

    def __call__(
        self, model: Callable[..., Any], batch: Batch, each: Tensor | None = None, tally: Tensor | None = None
    ) -> Tensor:
        """A float32 scalar; call it inside `room(batch)`. `each` gets every target's own loss, in their order."""
        return self._of(model, batch, each, apiece=False)

    def apiece(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """-log p of each target by itself, float32; call it inside `room(batch)`. A zero where there is no target."""
        return self._of(model, batch, None, apiece=True)

    def _of(self, model: Callable[..., Any], batch: Batch, each: Tensor | None, *, apiece: bool) -> Tensor:
        extra: dict[str, Any] = {"use_cache": False}
        if batch.keep is not None and self.keeps_logits:
            extra["logits_to_keep"] = batch.keep
        chosen = batch.chosen
        if batch.keep is not None and not self.keeps_logits:
            chosen = _places(batch, chosen)
        empty = batch.targets.numel() == 0
        wanted = head.Wanted(batch.targets, chosen, self.autocast, each, apiece)
        inside = nullcontext() if self.head is None or empty else self.head.computing(wanted)
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None), inside:
            logits = model(**batch.inputs, **extra).logits
        if empty:
            return logits.float().sum() * 0.0  # type: ignore[no-any-return]
        if self.head is not None:
            return logits.reshape(-1) if apiece else logits.sum()  # type: ignore[no-any-return]
        flat = logits.reshape(-1, logits.shape[-1]).index_select(0, chosen)
        exact = flat if flat.dtype == torch.float64 else flat.float()
        if each is not None:
            each.copy_(functional.cross_entropy(exact, batch.targets, reduction="none"))
        return functional.cross_entropy(exact, batch.targets, reduction="none" if apiece else "sum")


def _places(batch: Batch, chosen: Tensor) -> Tensor:
    """Places among all positions of the row, where `chosen` counts the kept ones only."""
    kept, length = len(batch.keep), batch.inputs["input_ids"].shape[1]  # type: ignore[arg-type]
    return chosen // kept * length + batch.keep[chosen % kept]  # type: ignore[index]
