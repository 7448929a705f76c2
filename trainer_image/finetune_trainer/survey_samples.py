"""A few rows of a split as training sees them: their text, with what is learnt marked. Called by `survey`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api import data_report as r
from finetune_trainer.tokens import Tokens

_SAMPLES = {"train": 3, "validation": 1, "test": 1}
_SHOWN_TOKENS = 512


def of(name: r.SplitName, tokens: Tokens, rows: NDArray[np.int64], tokenizer: Any) -> Iterator[r.RenderedSample]:
    """The first of `rows`."""
    for row in rows[: _SAMPLES[name]].tolist():
        ids, learnt = tokens.example(row)
        whole = int(tokens.whole[row])
        shown = min(len(ids), _SHOWN_TOKENS)
        origin = int(tokens.origins[row])
        yield r.RenderedSample(
            split=name,
            row=int(tokens.numbers[row]),
            file=tokens.facts.files[origin].name if len(tokens.facts.files) > 1 else "",
            tokens=len(ids),
            cut=whole > shown,
            pieces=pieces(tokenizer, ids[:shown], learnt[:shown]),
        )


def pieces(tokenizer: Any, ids: NDArray[np.int32], learnt: NDArray[np.bool_]) -> tuple[r.Piece, ...]:
    """Runs of tokens that are learnt, or are not."""
    borders = [0, *(np.flatnonzero(learnt[1:] != learnt[:-1]) + 1).tolist(), len(ids)]
    return tuple(
        r.Piece(text=str(tokenizer.decode(ids[begin:end].tolist())), learnt=bool(learnt[begin]))
        for begin, end in itertools.pairwise(borders)
        if end > begin
    )
