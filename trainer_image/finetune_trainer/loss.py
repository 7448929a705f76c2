"""The loss of a micro-batch: the sum of -log p over its learnt tokens. Called by the loop and by evaluation.

A sum, not a mean: only the loop knows how many tokens the whole global batch has. Models' own losses are never used
(some average over the micro-batch, some don't).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer import documents
from finetune_trainer.batch import Batch


@dataclass(frozen=True)
class LossSum:
    """`keeps_logits`: the model can compute its head at some positions only."""

    keeps_logits: bool
    autocast: torch.dtype | None
    device: str

    @classmethod
    def of(cls, base: torch.nn.Module, autocast: torch.dtype | None, device: str) -> LossSum:
        """Asks the base model's forward what it understands."""
        return cls("logits_to_keep" in inspect.signature(base.forward).parameters, autocast, device)

    @contextmanager
    def room(self, batch: Batch) -> Iterator[None]:
        """Forward and backward of a batch both happen in here."""
        with documents.apart(batch.documents):
            yield

    def __call__(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """A float32 scalar; call it inside `room(batch)`."""
        extra: dict[str, Any] = {"use_cache": False}
        if batch.keep is not None and self.keeps_logits:
            extra["logits_to_keep"] = batch.keep
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            logits = model(**batch.inputs, **extra).logits
        if batch.targets.numel() == 0:
            return logits.float().sum() * 0.0  # type: ignore[no-any-return]
        if batch.keep is not None and not self.keeps_logits:
            logits = logits.index_select(1, batch.keep)
        flat = logits.reshape(-1, logits.shape[-1])
        if batch.chosen is not None:
            flat = flat.index_select(0, batch.chosen)
        return functional.cross_entropy(flat.float(), batch.targets, reduction="sum")
