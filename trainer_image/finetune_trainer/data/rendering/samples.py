"""Shows rows as training sees them: their text, in which what counts in the loss is marked.

Of a long row only the beginning, the end and what surrounds each trained part is shown. The module
doesn't import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.messages import data_report as r
from finetune_trainer.data.reading import preference_rows
from finetune_trainer.data.row_statistics import RowStatistics
from finetune_trainer.data.token_cache import Tokens

_ROWS = {"train": 3, "validation": 1, "test": 1}
_EXAMPLES_OF_ROW = 5
_SHOWN = 512
"""Tokens of a sample that are shown at most, apart from the borders of its parts."""
_BORDER = 24
"""Tokens that are shown at the border of a trained part."""
_BORDERS = 32
"""Borders of trained parts that are shown of a long row."""
_LEFT_OUT = " […] "


def samples(
    name: r.SplitName, rows: RowStatistics, index: NDArray[np.int64], tokenizer: Any
) -> Iterator[r.RenderedSample]:
    """Yield the first rows of a split. `index` are its examples; the first row is shown with all of
    its examples, up to five."""
    tokens = rows.tokens
    if tokens is None or not len(index):
        return
    last_of_rows = rows.rows_of(index)[: _ROWS[name]]
    of_first = index[index <= last_of_rows[0]] if len(last_of_rows) else index[:0]
    for number in (*of_first[-_EXAMPLES_OF_ROW:-1].tolist(), *last_of_rows.tolist()):
        yield _sample(name, tokens, number, tokenizer)


def _sample(name: r.SplitName, tokens: Tokens, number: int, tokenizer: Any) -> r.RenderedSample:
    ids, loss_mask = tokens.example(number)
    file = tokens.facts.files[int(tokens.file_index[number])]
    is_pair = file.format == preference_rows.FORMAT
    shown = _shown(loss_mask)
    return r.RenderedSample(
        split=name,
        row=int(tokens.line_numbers[number]),
        file=file.name if len(tokens.facts.files) > 1 else "",
        tokens=len(ids),
        cut=int(tokens.uncut_lengths[number]) > len(ids) or not shown.all(),
        pieces=tuple(_pieces(tokenizer, ids, loss_mask, shown, int(tokens.sources[number]) if is_pair else len(ids))),
    )


def _shown(loss_mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which tokens are shown: all of a short row, otherwise the tokens near a border."""
    count = len(loss_mask)
    if count <= _SHOWN:
        return np.ones(count, np.bool_)
    changes = np.flatnonzero(loss_mask[1:] != loss_mask[:-1]) + 1
    shown = np.zeros(count, np.bool_)
    for border in (0, *changes[:_BORDERS].tolist(), count):
        shown[max(0, border - _BORDER) : border + _BORDER] = True
    return shown


def _pieces(
    tokenizer: Any, ids: NDArray[np.int32], loss_mask: NDArray[np.bool_], shown: NDArray[np.bool_], rejected: int
) -> Iterator[r.Piece]:
    """Yield the text, split where what counts in the loss, or what is shown, begins or ends.

    `rejected` is where the rejected answer of a pair begins.
    """
    changes = ((loss_mask[1:] != loss_mask[:-1]) & shown[1:]) | (shown[1:] != shown[:-1])
    borders = sorted({0, *(np.flatnonzero(changes) + 1).tolist(), min(rejected, len(ids)), len(ids)})
    for begin, end in itertools.pairwise(borders):
        in_loss = bool(loss_mask[begin]) and bool(shown[begin])
        side = "" if rejected >= len(ids) or not in_loss else "chosen" if begin < rejected else "rejected"
        text = str(tokenizer.decode(ids[begin:end].tolist())) if shown[begin] else _LEFT_OUT
        yield r.Piece(text=text, learnt=in_loss, side=side)
