"""Decides which rows are for training, validation and test, and gives access to their examples.

The module is pure and doesn't import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetune_api.messages.data_report import SplitName
from finetune_trainer.data.row_statistics import RowStatistics
from finetune_trainer.data.shared_prefixes import SharedPrefixes
from finetune_trainer.data.token_cache import Tokens
from finetune_trainer.errors import RunError


@dataclass(frozen=True)
class Split:
    """Holds the examples of one split, numbered 0 … n-1. Example i is row `index[i]` of `tokens`.

    If `pairs` is set, an example is a preference pair: its prompt and chosen answer (`source`
    tokens), then the rejected answer. `reference` has the shape (n, 2): the reference model's
    log-probabilities of both answers.
    """

    tokens: Tokens
    index: NDArray[np.int64]
    pairs: bool = False
    reference: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each example, with the shape (n,)."""
        return self.tokens.lengths[self.index]

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """The weight of each example in the loss: the tokens that count, or 1 for a pair."""
        if self.pairs:
            return np.ones(len(self), dtype=np.int64)
        return self.tokens.label_counts[self.index]

    @cached_property
    def answer_counts(self) -> NDArray[np.int64]:
        """The tokens of each example that count in the loss; for a pair, of its chosen answer."""
        if not self.pairs:
            return self.label_counts
        chosen = (loss_mask[:source] for _, loss_mask, source in map(self.example, range(len(self))))
        return np.fromiter(map(np.count_nonzero, chosen), np.int64, len(self))

    @cached_property
    def prefixes(self) -> SharedPrefixes:
        """The prefixes that the examples share."""
        return self.tokens.prefixes.of(self.index)

    def example(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_], int]:
        """Return (token ids, loss mask, source) of an example.

        The first `source` tokens go to the encoder of an encoder-decoder; for a pair they are the
        prompt and the chosen answer.
        """
        row = int(self.index[number])
        return *self.tokens.example(row), int(self.tokens.sources[row])

    def line_number(self, number: int) -> int:
        """Return the number of the record that example `number` comes from."""
        return int(self.tokens.line_numbers[self.index[number]])


@dataclass(frozen=True)
class Excerpts(Split):
    """Holds the first `limit` tokens of each example that is longer, all of which count in the
    loss, so that what is computed with them needs little time and memory."""

    limit: int = 0

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.minimum(self.tokens.lengths[self.index], self.limit)

    def example(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_], int]:
        ids, loss_mask, source = super().example(number)
        if len(ids) <= self.limit:
            return ids, loss_mask, source
        return ids[: self.limit], np.arange(self.limit) > 0, source


def excerpts(split: Split, limit: int) -> Split:
    """Return the first `limit` tokens of the examples of a split. Pairs, and rows with a source,
    have parts that belong together, and stay complete."""
    if split.pairs or split.tokens.sources[split.index].any():
        return split
    return Excerpts(split.tokens, split.index, limit=limit)


def all_rows(tokens: Tokens) -> Split:
    """Return a split with every row of a token cache, in order."""
    return Split(tokens, np.arange(len(tokens)))


@dataclass(frozen=True)
class SplitRows:
    """Holds the rows of a split, as indices into `rows`; a weight may repeat a row.

    `held_out` is set if they were chosen from the training files by a fraction. `left_out` counts
    the rows that the weights of their files left out.
    """

    rows: RowStatistics
    index: NDArray[np.int64]
    held_out: bool = False
    left_out: int = 0


def split_rows(
    rows: Mapping[SplitName, RowStatistics], validation: float | None, test: float | None
) -> dict[SplitName, SplitRows]:
    """Decide which rows each split has. `rows` are those of each split's own files.

    A split without files of its own is held out of the training rows by its fraction, if that
    isn't None. Raises RunError if no row would be left to train on.
    """
    train = rows["train"]
    indices = hold_out(train.digests, None if "validation" in rows else validation, None if "test" in rows else test)
    index = mixture(train.digests, train.file_index, indices.train, [file.weight for file in train.files])
    left_out = len(train.rows_of(indices.train)) - len(train.rows_of(np.unique(index)))
    splits: dict[SplitName, SplitRows] = {"train": SplitRows(train, index, left_out=left_out)}
    held_out: tuple[tuple[SplitName, NDArray[np.int64] | None], ...] = (
        ("validation", indices.validation),
        ("test", indices.test),
    )
    for name, indices_of_split in held_out:
        if name in rows:
            splits[name] = SplitRows(rows[name], np.arange(len(rows[name].line_numbers)))
        elif indices_of_split is not None:
            splits[name] = SplitRows(train, indices_of_split, held_out=True)
    return splits


@dataclass(frozen=True)
class HeldOut:
    """Holds disjoint indices of the rows of each split; None for a split without a fraction."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64] | None
    test: NDArray[np.int64] | None


def hold_out(digests: NDArray[np.uint8], validation: float | None, test: float | None) -> HeldOut:
    """Choose the rows that are held out, by their content alone.

    A row therefore stays in its split if other rows come or go, if the other fraction changes, and
    whichever file it is in; equal rows stay together. At least one row is held out. `digests` have
    16 bytes per row. Raises RunError if no row would be left to train on.
    """
    positions = _positions(digests[:, :8])
    low, high = _lowest(positions, test), _lowest(1 - positions, validation)
    if test is not None and validation is not None:
        low &= ~high
    for fraction, chosen, name in ((validation, high, "validation"), (test, low, "test")):
        if fraction is not None and (not chosen.any() or (low | high).all()):
            rows = "1 row" if len(digests) == 1 else f"{len(digests)} rows"
            raise RunError(
                "DatasetInvalid",
                f"dataset.{name}.fraction is {fraction}: {rows} can't be split; give more rows or {name}.uri",
            )
    return HeldOut(
        np.flatnonzero(~(low | high)),
        np.flatnonzero(high) if validation is not None else None,
        np.flatnonzero(low) if test is not None else None,
    )


def mixture(
    digests: NDArray[np.uint8], file_index: NDArray[np.int32], index: NDArray[np.int64], weights: Sequence[float]
) -> NDArray[np.int64]:
    """Return the rows of an epoch: `index`, with each row as often as the weight of its file.

    The fractional part of a weight repeats the rows with the lowest digests once more, so they are
    the same ones in every run. Raises RunError if no row is left.
    """
    row_weights = np.asarray(weights, np.float64)[file_index[index]]
    if (row_weights == 1).all():
        return index
    counts = np.floor(row_weights).astype(np.int64) + (_positions(digests[index, 8:]) < row_weights % 1)
    if not counts.any():
        raise RunError("DatasetInvalid", "dataset.sources: the weights leave no row; raise one")
    return np.repeat(index, counts)


def _positions(digests: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Convert 8 bytes per row to a number in [0, 1), evenly distributed."""
    numbers = np.ascontiguousarray(digests).view(">u8").ravel()
    return (numbers >> np.uint64(11)).astype(np.float64) / 2.0**53


def _lowest(positions: NDArray[np.float64], fraction: float | None) -> NDArray[np.bool_]:
    """Return a mask of the rows below the fraction, at least one; none if there is no fraction."""
    if fraction is None:
        return np.zeros(len(positions), np.bool_)
    chosen: NDArray[np.bool_] = positions < fraction
    return chosen if chosen.any() else positions == positions.min()
