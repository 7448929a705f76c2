"""Split: the examples of one purpose (train, validation, test), seen as 0 … n-1. Pure views of the token cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetune_trainer import plan
from finetune_trainer.failure import Failed
from finetune_trainer.prefixes import Prefixes
from finetune_trainer.tokens import Tokens


@dataclass(frozen=True)
class Split:
    """Some rows of a token cache. Example i is row `index[i]` of the cache."""

    tokens: Tokens
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return self.tokens.lengths[self.index]

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        return self.tokens.label_counts[self.index]

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


def held_out(tokens: Tokens, seed: int, fraction: float) -> tuple[Split, Split]:
    """(train, validation), disjoint."""
    try:
        train, validation = plan.held_out(seed, len(tokens), fraction)
    except ValueError as error:
        raise Failed(
            "DatasetInvalid", f"dataset.validation.fraction is {fraction}: {error}; give more rows or validation.uri"
        ) from None
    return Split(tokens, train), Split(tokens, validation)
