"""Defines what is measured of each usable row: numbers and digests, without its text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_api.messages.data_report import FileReport, Finding
from finetune_trainer.data.preparation import Examples
from finetune_trainer.data.reading.row import Problem
from finetune_trainer.data.token_cache import Tokens


@dataclass(frozen=True)
class RowStatistics:
    """Describes the usable rows, in the order of their files, and what was dropped.

    Every array has one entry per example, and digests have 16 bytes each; a row may have several
    examples, of which all but the last are `earlier`. `lengths` are in tokens, or in
    characters if `tokens` is None because there was no tokenizer. `uncut_lengths` are the lengths
    before rows were truncated to dataset.maxSequenceLength.
    """

    line_numbers: NDArray[np.int64]
    file_index: NDArray[np.int32]
    lengths: NDArray[np.int64]
    label_counts: NDArray[np.int64]
    uncut_lengths: NDArray[np.int64]
    characters: NDArray[np.int64]
    digests: NDArray[np.uint8]
    prompts: NDArray[np.uint8]
    near_duplicate_digests: NDArray[np.uint8]
    earlier: NDArray[np.bool_]
    files: tuple[FileReport, ...]
    problems: tuple[Problem, ...]
    dropped: int
    unlabelled: int
    findings: tuple[Finding, ...] = ()
    tokens: Tokens | None = None

    @property
    def count(self) -> int:
        """The number of usable rows."""
        return len(self.earlier) - int(np.count_nonzero(self.earlier))

    def rows_of(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the examples among these that stand for their rows: the last one of each."""
        return examples[~self.earlier[examples]]

    @classmethod
    def of_tokens(cls, tokens: Tokens) -> RowStatistics:
        """Return the statistics of the rows in a token cache; arrays stay memory-mapped."""
        return cls(
            tokens.line_numbers, tokens.file_index, tokens.lengths, tokens.label_counts, tokens.uncut_lengths,
            tokens.characters, tokens.digests, tokens.prompts, tokens.near_duplicate_digests, tokens.earlier,
            tokens.facts.files, tokens.facts.problems, tokens.facts.dropped, tokens.facts.unlabelled,
            tokens.facts.findings, tokens,
        )  # fmt: skip

    @classmethod
    def of_examples(cls, examples: Examples) -> RowStatistics:
        """Return the statistics of rows that were read without a tokenizer."""
        arrays = examples.arrays
        return cls(
            arrays["line_numbers"], arrays["file_index"], examples.lengths, arrays["label_counts"],
            arrays["uncut_lengths"], arrays["characters"], arrays["digests"], arrays["prompts"],
            arrays["near_duplicate_digests"], arrays["earlier"],
            examples.files, examples.problems, examples.dropped, examples.unlabelled, examples.findings,
        )  # fmt: skip
