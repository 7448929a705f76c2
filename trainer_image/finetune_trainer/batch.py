"""Micro-batch → tensors: packed end to end, or each row padded on the right. Called by the loop and by evaluation.

Positions whose token isn't learnt never reach the output head (`keep`). Labels come from the examples' own marks,
never from comparing tokens with the padding token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_trainer import layout
from finetune_trainer.layout import Layout
from finetune_trainer.plan import Micro
from finetune_trainer.split import Split


@dataclass(frozen=True)
class Batch:
    """`targets[i]` is predicted at flat position `chosen[i]` of the kept positions (`keep`, or all of them)."""

    inputs: dict[str, Tensor]
    targets: Tensor
    chosen: Tensor
    keep: Tensor | None = None
    layout: Layout | None = None
    answer: Tensor | None = None  # of pairs: which answer a target belongs to, two to an example, the chosen one first
    reference: Tensor | None = None  # of pairs: (examples, 2)


@dataclass(frozen=True)
class Collator:
    """`start` is the decoder's first token (encoder-decoder only)."""

    packed: bool
    shared: bool
    encoder_decoder: bool
    pad: int
    start: int
    device: torch.device

    def __call__(self, split: Split, micro: Micro) -> Batch:
        rows = [split.example(index) for index in micro]
        if not rows:
            return self._idle()
        if split.pairs:
            return self._of_pairs(split, micro, rows)
        if self.encoder_decoder:
            return self._sequence_to_sequence(rows)
        if not self.packed:
            return self._padded(rows)
        none = (0,) * len(rows)
        return self._packed(rows, split.prefixes.shared(micro, split.lengths) if self.shared else none)

    def _of_pairs(self, split: Split, micro: Micro, examples: list[Any]) -> Batch:
        """Two rows an example. The rejected answer takes the prompt from the chosen one; with `shared`, the chosen one
        what its example begins with from the example before, as far as both of that one's answers have it."""
        common = split.prefixes.shared(micro, split.lengths) if self.shared else (0,) * len(examples)
        rows: list[Any] = []
        shared: list[int] = []
        before = 0
        for (ids, learnt, source), same in zip(examples, common, strict=True):
            prompt = int(np.argmax(learnt))
            rejected = np.concatenate([ids[:prompt], ids[source:]]), np.concatenate([learnt[:prompt], learnt[source:]])
            rows += [(ids[:source], learnt[:source], prompt), (*rejected, prompt)]
            shared += [min(same, before, source - 1), prompt]
            before = prompt
        batch = self._of_answers(rows, tuple(shared))
        answer = np.repeat(np.arange(len(rows)), [int(np.count_nonzero(learnt)) for _, learnt, _ in rows])
        told = None if split.reference is None else split.reference[list(micro)]
        return replace(
            batch,
            answer=self._tensor(answer),
            reference=None if told is None else torch.as_tensor(told, device=self.device),
        )

    def _of_answers(self, rows: list[Any], shared: tuple[int, ...]) -> Batch:
        if self.encoder_decoder:
            return self._sequence_to_sequence(rows)
        return self._packed(rows, shared) if self.packed else self._padded(rows)

    def _packed(self, rows: list[Any], shared: tuple[int, ...]) -> Batch:
        """End to end, beginnings that are shared laid down once: a token's target is its own example's next one."""
        row = layout.lay([len(ids) for ids, *_ in rows], shared)
        ids = np.concatenate([ids[common:] for (ids, *_), common in zip(rows, shared, strict=True)])
        positions = np.concatenate([np.arange(s, len(ids)) for (ids, *_), s in zip(rows, shared, strict=True)])
        padding = np.arange(row.layout.size - len(ids))
        ids, positions = np.append(ids, np.full_like(padding, self.pad)), np.append(positions, padding)
        learnt = [np.flatnonzero(flags) for _, flags, *_ in rows]
        before = np.concatenate([places[at - 1] for places, at in zip(row.places, learnt, strict=True)])
        keep, chosen = np.unique(before, return_inverse=True)
        return Batch(
            {"input_ids": self._tensor(ids[None]), "position_ids": self._tensor(positions[None])},
            targets=self._tensor(np.concatenate([ids[at] for (ids, *_), at in zip(rows, learnt, strict=True)])),
            chosen=self._tensor(chosen),
            keep=self._tensor(keep),
            layout=row.layout,
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
            chosen=self._tensor(row * len(keep) + place),
            keep=self._tensor(keep),
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
