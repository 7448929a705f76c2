"""Turns a micro-batch into tensors: packed end to end, or each row padded on the right.

Positions whose next token doesn't count in the loss never reach the output head (`keep`). Labels
come from the loss masks of the examples, never from comparing tokens with the padding token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer.data.batching import packed_layout, transfer
from finetune_trainer.data.batching.batch_plan import MicroBatch
from finetune_trainer.data.batching.packed_layout import Layout
from finetune_trainer.data.batching.sequence_part import WHOLE, SequencePart
from finetune_trainer.data.splits import Split


@dataclass(frozen=True)
class Padding:
    """Holds masks of the shape (rows, length) that are true for padding; None if there is none.

    A decoder-only model has no encoder.
    """

    decoder: Tensor | None = None
    encoder: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Holds the tensors of a micro-batch.

    The output head gets only the columns `keep` of the input, or all of them if it is None. Of
    these (rows, kept columns), something is predicted at the flat indices `positions`, or at all of
    them if it is None. `targets[i]` is predicted at the position with the index `chosen[i]`.
    `sorted_chosen` are the same indices in ascending order, in the host's memory.

    If ranks share a row, `sequence` is the part that the tensors belong to, while `layout` is that
    of the whole row. `own` are then the indices of these targets among those of the whole row.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    chosen: Tensor
    keep: Tensor | None = None
    positions: Tensor | None = None
    layout: Layout | None = None
    padding: Padding | None = None
    answer: Tensor | None = None  # pairs: the answer of each target; a pair has two, the chosen one first
    answers: int = 0  # pairs: the number of answers
    reference: Tensor | None = None  # pairs: log-probabilities of the reference model, (examples, 2)
    sorted_chosen: NDArray[np.int64] | None = None
    sequence: SequencePart = WHOLE
    own: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Collator:
    """Makes batches of the examples of a split.

    `decoder_start_token` is the first token of the decoder of an encoder-decoder. Of a packed row,
    only the part `sequence` is returned. The size of a part is a multiple of `grain`, or if that is
    None, of what suits the device.
    """

    packed: bool
    shared: bool
    encoder_decoder: bool
    pad_token: int
    decoder_start_token: int
    device: torch.device
    sequence: SequencePart = WHOLE
    grain: int | None = None

    def __call__(self, split: Split, micro_batch: MicroBatch) -> Batch:
        """Return the batch of these examples of the split.

        A rank without examples gets an idle batch.
        """
        rows = [split.example(index) for index in micro_batch]
        if not rows:
            return self._idle(split)
        if split.pairs:
            return self._of_pairs(split, micro_batch, rows)
        if self.encoder_decoder:
            return self._sequence_to_sequence(rows)
        if not self.packed:
            return self._padded(rows)
        none = (0,) * len(rows)
        return self._packed(rows, split.prefixes.shared(micro_batch, split.lengths) if self.shared else none)

    def _of_pairs(self, split: Split, micro_batch: MicroBatch, examples: list[Any]) -> Batch:
        """Lay out each preference pair as two sequences, the chosen one first.

        The rejected one reuses the prompt of the chosen one. If `shared`, the chosen one also
        reuses the prefix that it has in common with the previous pair, at most the prompt of that
        pair.
        """
        common = split.prefixes.shared(micro_batch, split.lengths) if self.shared else (0,) * len(examples)
        rows: list[Any] = []
        shared: list[int] = []
        previous_prompt = 0
        for (ids, mask, source), prefix in zip(examples, common, strict=True):
            prompt = int(np.argmax(mask))
            rejected = np.concatenate([ids[:prompt], ids[source:]]), np.concatenate([mask[:prompt], mask[source:]])
            rows += [(ids[:source], mask[:source], prompt), (*rejected, prompt)]
            shared += [min(prefix, previous_prompt, source - 1), prompt]
            previous_prompt = prompt
        batch = self._of_answers(rows, tuple(shared))
        answer = np.repeat(np.arange(len(rows)), [int(np.count_nonzero(mask)) for _, mask, _ in rows])
        reference = None if split.reference is None else split.reference[list(micro_batch)]
        return replace(
            batch,
            answer=self._tensor(answer if batch.own is None else answer[batch.own]),
            answers=len(rows),
            reference=None if reference is None else transfer.to_device(reference, self.device),
        )

    def _of_answers(self, rows: list[Any], shared: tuple[int, ...]) -> Batch:
        if self.encoder_decoder:
            return self._sequence_to_sequence(rows)
        return self._packed(rows, shared) if self.packed else self._padded(rows)

    def _packed(self, rows: list[Any], shared: tuple[int, ...]) -> Batch:
        """Put rows end to end, with shared prefixes only once.

        The target of a token is the next one of its example.
        """
        part, grain = self.sequence, packed_layout.grain(self.device.type) if self.grain is None else self.grain
        row = packed_layout.pack([len(ids) for ids, *_ in rows], shared, grain * part.size)
        ids = np.concatenate([ids[common:] for (ids, *_), common in zip(rows, shared, strict=True)])
        positions = np.concatenate([np.arange(s, len(ids)) for (ids, *_), s in zip(rows, shared, strict=True)])
        ids, positions = (np.append(array, array[row.padding]) for array in (ids, positions))
        labels = [np.flatnonzero(mask) for _, mask, *_ in rows]
        before = np.concatenate([position[at - 1] for position, at in zip(row.positions, labels, strict=True)])
        targets = np.concatenate([ids[at] for (ids, *_), at in zip(rows, labels, strict=True)])
        own = None
        if part:
            columns, own = part.columns(row.layout.size), part.within(before, row.layout.size)
            ids, positions = ids[columns], positions[columns]
            before, targets = before[own] - columns.start, targets[own]
        keep, chosen = np.unique(before, return_inverse=True)
        if not len(keep):  # the output layer gets one position nevertheless, so that it takes part
            keep = np.zeros(1, dtype=np.int64)
        return Batch(
            {"input_ids": self._tensor(ids[None]), "position_ids": self._tensor(positions[None])},
            targets=self._tensor(targets),
            chosen=self._tensor(chosen),
            keep=self._tensor(keep),
            layout=row.layout,
            sorted_chosen=np.sort(chosen),
            sequence=part,
            own=own,
        )

    def _padded(self, rows: list[Any]) -> Batch:
        """Pad rows on the right.

        There is no attention mask: a causal model ignores what comes after a token.
        """
        ids = self._pad([row[0] for row in rows])
        loss_mask = self._pad([row[1] for row in rows], value=0).astype(bool)
        row, column = np.nonzero(loss_mask)
        keep, kept_column = np.unique(column - 1, return_inverse=True)
        positions, chosen = np.unique(row * len(keep) + kept_column, return_inverse=True)
        return Batch(
            {"input_ids": self._tensor(ids)},
            targets=self._tensor(ids[row, column]),
            chosen=self._tensor(chosen),
            keep=self._tensor(keep),
            positions=None if len(positions) == len(rows) * len(keep) else self._tensor(positions),
            padding=Padding(self._padding([len(row[0]) for row in rows])),
            sorted_chosen=np.sort(chosen),
        )

    def _sequence_to_sequence(self, rows: list[Any]) -> Batch:
        sources = [ids[:source] for ids, _, source in rows]
        targets = [ids[source:] for ids, _, source in rows]
        labels = self._pad(targets)
        real = self._pad([np.ones(len(target)) for target in targets], value=0).astype(bool)
        chosen = np.arange(np.count_nonzero(real))
        decoder = np.concatenate([np.full((len(rows), 1), self.decoder_start_token), labels[:, :-1]], axis=1)
        return Batch(
            {
                "input_ids": self._tensor(self._pad(sources)),
                "attention_mask": self._tensor(self._pad([np.ones(len(source)) for source in sources], value=0)),
                "decoder_input_ids": self._tensor(decoder),
            },
            targets=self._tensor(labels[real]),
            chosen=self._tensor(chosen),
            positions=None if real.all() else self._tensor(np.flatnonzero(real)),
            padding=Padding(*(self._padding([len(part) for part in parts]) for parts in (targets, sources))),
            sorted_chosen=chosen,
        )

    def _idle(self, split: Split) -> Batch:
        """Return one token that counts for nothing, so the rank joins collective operations."""
        token = self._tensor(split.example(0)[0][None, :1])
        inputs = {"input_ids": token}
        if self.encoder_decoder:
            inputs = {"input_ids": token, "attention_mask": torch.ones_like(token), "decoder_input_ids": token}
        nothing = self._tensor(np.zeros(0))
        return Batch(inputs, targets=nothing, chosen=nothing)

    def _pad(self, rows: list[Any], value: int | None = None) -> np.ndarray[Any, np.dtype[np.int64]]:
        longest = max(len(row) for row in rows)
        matrix = np.full((len(rows), longest), self.pad_token if value is None else value, np.int64)
        for index, row in enumerate(rows):
            matrix[index, : len(row)] = row
        return matrix

    def _padding(self, lengths: list[int]) -> Tensor | None:
        padding = _padding(lengths)
        return None if padding is None else transfer.to_device(padding, self.device)

    def _tensor(self, array: Any) -> Tensor:
        return transfer.to_device(np.asarray(array, dtype=np.int64), self.device)


def _padding(lengths: list[int]) -> Tensor | None:
    """Return the padding mask of rows that are padded on the right; None if no row is."""
    columns, ends = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    return columns >= ends if min(lengths) < max(lengths) else None
