"""Split: the examples of one purpose (train, validation, test), seen as 0 … n-1. Pure views of the token cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.failure import Failed
from finetune_trainer.prefixes import Prefixes
from finetune_trainer.tokens import Tokens


@dataclass(frozen=True)
class Split:
    """Some rows of a token cache. Example i is row `index[i]` of the cache."""

    tokens: Tokens
    index: NDArray[np.int64]
    pairs: bool = False  # an example is a prompt and the answer chosen (`source` tokens), then the one rejected
    reference: NDArray[np.float64] | None = None  # of pairs, see `preference`

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return self.tokens.lengths[self.index]

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """What an example weighs: its learnt tokens; a pair counts once."""
        if self.pairs:
            return np.ones(len(self), dtype=np.int64)
        return self.tokens.label_counts[self.index]

    @cached_property
    def answer_counts(self) -> NDArray[np.int64]:
        """Learnt tokens; of a pair, those of the chosen answer."""
        if not self.pairs:
            return self.label_counts
        chosen = (learnt[:source] for _, learnt, source in map(self.example, range(len(self))))
        return np.fromiter(map(np.count_nonzero, chosen), np.int64, len(self))

    @cached_property
    def prefixes(self) -> Prefixes:
        return self.tokens.prefixes.of(self.index)

    def example(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_], int]:
        """(ids, learnt, how many of them go to an encoder)"""
        row = int(self.index[number])
        return *self.tokens.example(row), int(self.tokens.sources[row])

    def line(self, number: int) -> int:
        """The line of the file that example `number` comes from."""
        return int(self.tokens.numbers[self.index[number]])


def whole(tokens: Tokens) -> Split:
    return Split(tokens, np.arange(len(tokens)))


@dataclass(frozen=True)
class Parts:
    """Places of rows, disjoint; None where nothing was asked for."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64] | None
    test: NDArray[np.int64] | None


def held_out(digests: NDArray[np.uint8], validation: float | None, test: float | None) -> Parts:
    """Which rows are held out depends on their content alone: a row stays where it is when others come or go, when the
    other fraction changes, and in whichever file it is; equal rows stay together. The least is one row.

    `digests` are 16 bytes a row. Raises Failed where nothing would be left to train on.
    """
    places = _places(digests[:, :8])
    low, high = _lowest(places, test), _lowest(1 - places, validation)
    if test is not None and validation is not None:
        low &= ~high
    for fraction, taken, name in ((validation, high, "validation"), (test, low, "test")):
        if fraction is not None and (not taken.any() or (low | high).all()):
            raise Failed(
                "DatasetInvalid",
                f"dataset.{name}.fraction is {fraction}: {len(digests)} rows can't be split; give more rows or "
                f"{name}.uri",
            )
    return Parts(
        np.flatnonzero(~(low | high)),
        np.flatnonzero(high) if validation is not None else None,
        np.flatnonzero(low) if test is not None else None,
    )


def mixture(
    digests: NDArray[np.uint8], origins: NDArray[np.int32], index: NDArray[np.int64], files: Sequence[float]
) -> NDArray[np.int64]:
    """The rows of an epoch: each of `index` as often as its file's weight says. Of a weight's fraction, the rows whose
    content's number is lowest come once more, so that they are the same ones in every run."""
    weights = np.asarray(files, np.float64)[origins[index]]
    if (weights == 1).all():
        return index
    often = np.floor(weights).astype(np.int64) + (_places(digests[index, 8:]) < weights % 1)
    if not often.any():
        raise Failed("DatasetInvalid", "dataset.sources: the weights leave no row; raise one")
    return np.repeat(index, often)


def _places(digests: NDArray[np.uint8]) -> NDArray[np.float64]:
    """8 bytes → a number from 0 to below 1, evenly spread."""
    numbers = np.ascontiguousarray(digests).view(">u8").ravel()
    return (numbers >> np.uint64(11)).astype(np.float64) / 2.0**53


def _lowest(places: NDArray[np.float64], fraction: float | None) -> NDArray[np.bool_]:
    """Those below the fraction, one at least."""
    if fraction is None:
        return np.zeros(len(places), np.bool_)
    chosen: NDArray[np.bool_] = places < fraction
    return chosen if chosen.any() else places == places.min()
