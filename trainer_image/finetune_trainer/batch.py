"""Micro-batch → tensors: packed end to end, or padded on the right. Called by the loop and by evaluation.

Positions whose token isn't learnt never reach the output head (`keep`). Labels come from the examples' own marks,
never from comparing tokens with the padding token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_trainer.plan import Micro
from finetune_trainer.split import Split


@dataclass(frozen=True)
class Batch:
    """`targets[i]` is predicted at flat position `chosen[i]` of the kept logits (all of them where None)."""

    inputs: dict[str, Tensor]
    targets: Tensor
    keep: Tensor | None = None
    chosen: Tensor | None = None
    documents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Collator:
    """`start` is the decoder's first token (encoder-decoder only)."""

    packed: bool
    encoder_decoder: bool
    pad: int
    start: int
    device: torch.device

    def __call__(self, split: Split, micro: Micro) -> Batch:
        rows = [split.example(index) for index in micro]
        if not rows:
            return self._idle()
        if self.encoder_decoder:
            return self._sequence_to_sequence(rows)
        return self._packed(rows) if self.packed else self._padded(rows)

    def _packed(self, rows: list[Any]) -> Batch:
        ids = np.concatenate([row[0] for row in rows]).astype(np.int64)
        learnt = np.concatenate([row[1] for row in rows])
        lengths = tuple(len(row[0]) for row in rows)
        positions = np.concatenate([np.arange(length) for length in lengths])
        at = np.flatnonzero(learnt)
        return Batch(
            {"input_ids": self._tensor(ids[None]), "position_ids": self._tensor(positions[None])},
            targets=self._tensor(ids[at]),
            keep=self._tensor(at - 1),
            documents=lengths,
        )

    def _padded(self, rows: list[Any]) -> Batch:
        """No attention mask: a causal model never looks at the padding that comes after."""
        ids = self._pad([row[0] for row in rows])
        learnt = self._pad([row[1] for row in rows], value=0).astype(bool)
        row, at = np.nonzero(learnt)
        keep, place = np.unique(at - 1, return_inverse=True)
        return Batch(
            {"input_ids": self._tensor(ids)},
            targets=self._tensor(ids[row, at]),
            keep=self._tensor(keep),
            chosen=self._tensor(row * len(keep) + place),
        )

    def _sequence_to_sequence(self, rows: list[Any]) -> Batch:
        sources = [ids[:source] for ids, _, source in rows]
        targets = [ids[source:] for ids, _, source in rows]
        labels = self._pad(targets)
        real = self._pad([np.ones(len(target)) for target in targets], value=0).astype(bool)
        decoder = np.concatenate([np.full((len(rows), 1), self.start), labels[:, :-1]], axis=1)
        return Batch(
            {
                "input_ids": self._tensor(self._pad(sources)),
                "attention_mask": self._tensor(self._pad([np.ones(len(source)) for source in sources], value=0)),
                "decoder_input_ids": self._tensor(decoder),
            },
            targets=self._tensor(labels[real]),
            chosen=self._tensor(np.flatnonzero(real)),
        )

    def _idle(self) -> Batch:
        """One token that counts for nothing: this rank only takes part in what all ranks do together."""
        one = self._tensor(np.full((1, 1), self.pad))
        inputs = {"input_ids": one}
        if self.encoder_decoder:
            inputs = {"input_ids": one, "attention_mask": torch.ones_like(one), "decoder_input_ids": one}
        nothing = self._tensor(np.zeros(0))
        return Batch(inputs, targets=nothing, chosen=nothing)

    def _pad(self, rows: list[Any], value: int | None = None) -> np.ndarray[Any, np.dtype[np.int64]]:
        whole = np.full((len(rows), max(len(row) for row in rows)), self.pad if value is None else value, np.int64)
        for index, row in enumerate(rows):
            whole[index, : len(row)] = row
        return whole

    def _tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(np.asarray(array, dtype=np.int64), device=self.device)
