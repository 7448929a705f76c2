"""Defines DataReport: statistics and problems of a run's rows, computed before training.

It is stored as finetune/data-report.json. Without a tokenizer, lengths are in characters (`unit`)
and the token figures are absent.

    {"version": 1, "unit": "tokens", "maxSequenceLength": 2048,
     "template": {"choice": "chat template", "reason": "…"},
     "splits": [
       {"split": "train", "rows": 1480, "read": 1500, "dropped": 20,
        "droppedRows": [{"row": 17, "file": "", "reason": "completion is empty"}],
        "files": [{"name": "train.jsonl", "container": "jsonl", "compression": "",
                   "format": "messages", …}],
        "duplicates": {"rows": 3, "groups": [[4, 90]]}, "tokens": 310221, "labelTokens": 90122,
        "lengths": {"edges": [0, 32, …], "counts": [10, …], "minimum": 9, "median": 120.0, …}, …}
     ],
     "leaks": [{"first": "train", "second": "test", "rows": 2, "prompts": 5,
                "examples": [[12, 3]]}],
     "warnings": [{"reason": "FewExamples", "message": "…"}],
     "samples": [{"split": "train", "row": 1,
                  "pieces": [{"text": "<|user|>…", "learnt": false}, …]}]}

Shares are 0 to 1. Row numbers count a file's lines (JSON lines, CSV) or elements (JSON, Parquet)
from 1. Long lists are truncated to LISTED entries; the count next to a list includes all of them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.base import LenientModel

LISTED = 100
FEW_EXAMPLES = 1000

SplitName = Literal["train", "validation", "test"]


class FileReport(LenientModel):
    """Describes a file that rows were read from."""

    name: str
    source: str = Field(default="", description="The URI in the spec that the file belongs to.")
    container: Literal["jsonl", "json", "csv", "parquet", "arrow"]
    compression: str = Field(default="", description="gzip, zstd, bz2, xz, or empty.")
    format: str = Field(default="", description="Format of its rows; empty if no row could be read.")
    rows: int = Field(description="Usable rows.")
    dropped: int = 0
    weight: float = Field(default=1.0, description="How often each row is trained on per epoch.")


class Finding(LenientModel):
    """Counts something that rows have and that isn't trained on, or not as it may be meant."""

    reason: str = Field(
        description="KeysNotRead, TemplateOmits, AnswersNotTrained, AnswersApart, AnswersShared, "
        "EmptyQuestions, EmptyAnswers, OpenReasoning, ReasoningOnly, BrokenText, TurnsCut, Blanks, CallsAsText, "
        "TagsTwice, ControlTokens or RenderedTwice."
    )
    subject: str = Field(description="A key, messages[].key for a key of turns, or a part such as tool results.")
    count: int
    row: int = Field(description="The first row that has it.")
    file: str = Field(default="", description="Empty if the split has a single file.")


class DroppedRow(LenientModel):
    """Names a row that isn't trained on, and the reason."""

    row: int
    file: str = Field(default="", description="Empty if the split has a single file.")
    reason: str


class Duplicates(LenientModel):
    """Counts rows that repeat an earlier one; each group lists row numbers, the original first."""

    rows: int = 0
    groups: tuple[tuple[int, ...], ...] = ()


class Histogram(LenientModel):
    """Describes the lengths of rows, in the report's unit.

    `counts[i]` rows have edges[i] <= length < edges[i+1]; the last bin includes its upper edge.
    """

    edges: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    minimum: int = 0
    mean: float = 0.0
    median: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    maximum: int = 0


class TruncatedRows(LenientModel):
    """Counts rows longer than dataset.maxSequenceLength, whose ends are cut off."""

    rows: int = 0
    tokens: int = Field(default=0, description="Tokens cut off from all rows together.")
    numbers: tuple[int, ...] = ()


class SharedPrefixes(LenientModel):
    """Measures the prefixes that rows have in common (an instruction, a system prompt).

    It is an upper bound on what prefix sharing saves, since a prefix is computed once per
    micro-batch.
    """

    tokens: int = Field(default=0, description="Tokens that need not be computed again.")
    share: float = Field(default=0.0, description="Share of all tokens. 0 to 1.")


class SplitReport(LenientModel):
    """Describes the rows of one split, after validation and test rows were held out."""

    split: SplitName
    files: tuple[FileReport, ...] = Field(default=(), description="Empty for a split held out of the training files.")
    held_out: bool = Field(default=False, description="Selected from the training files by a fraction.")
    rows: int = Field(description="Usable rows.")
    examples: int = Field(description="Rows per epoch; differs from `rows` if sources have weights.")
    read: int = Field(description="Rows in the files; 0 if held out.")
    left_out: int = Field(default=0, description="Usable rows that a weight below 1 leaves out of every epoch.")
    dropped: int = 0
    unlabelled: int = Field(
        default=0,
        description="Rows among `dropped` without a label, or without a confident one. They never fail a job.",
    )
    dropped_rows: tuple[DroppedRow, ...] = ()
    findings: tuple[Finding, ...] = ()
    duplicates: Duplicates = Field(default_factory=Duplicates)
    near_duplicates: Duplicates = Field(
        default_factory=Duplicates,
        description="Rows that differ from an earlier one only in case, spaces, punctuation or numbers.",
    )
    same_prompts: int = Field(default=0, description="Rows whose prompt occurred before with another answer.")
    characters: int = 0
    tokens: int | None = None
    label_tokens: int | None = Field(default=None, description="Tokens that are trained on.")
    label_share: float | None = Field(default=None, description="labelTokens / tokens.")
    lengths: Histogram = Field(default_factory=Histogram)
    answer_lengths: Histogram = Field(
        default_factory=Histogram, description="Lengths of the answers that are trained on."
    )
    padding_share: float | None = Field(
        default=None,
        description="Share of padding if rows were padded in batches of 8 in random order. Packing has hardly any.",
    )
    truncated: TruncatedRows = Field(default_factory=TruncatedRows)
    shared: SharedPrefixes = Field(default_factory=SharedPrefixes)


class Leak(LenientModel):
    """Counts rows of one split that another one contains too."""

    first: SplitName
    second: SplitName
    rows: int = Field(description="Rows of `second` that are also in `first`.")
    prompts: int = Field(default=0, description="Rows of `second` whose prompt is also in `first`, including `rows`.")
    near: int = Field(default=0, description="Other rows of `second` that are near-duplicates of a row of `first`.")
    examples: tuple[tuple[int, int], ...] = Field(default=(), description="Pairs of row numbers of identical rows.")
    near_examples: tuple[tuple[int, int], ...] = Field(
        default=(), description="Pairs of row numbers of near-duplicates."
    )


class DataWarning(LenientModel):
    """Points out what a person should look at; it never fails a job."""

    reason: str = Field(
        description="FewExamples, HeldOutFiles, TemplateVaries, a reason of Finding, Leaks, NearLeaks, Duplicates, "
        "NearDuplicates, Truncated, RowsDropped or Unlabelled."
    )
    message: str


class Piece(LenientModel):
    """Holds a part of a rendered row, and whether it is trained on (counted in the loss)."""

    text: str
    learnt: bool
    side: Literal["", "chosen", "rejected"] = Field(default="", description="Of a preference pair: which answer.")


class RenderedSample(LenientModel):
    """Shows a row as the model sees it; the concatenated pieces are its text, of which a long row
    has only the parts near what is trained on."""

    split: SplitName
    row: int
    file: str = ""
    tokens: int | None = None
    cut: bool = Field(
        default=False, description="Whether the row is longer than what is trained on, or than what is shown here."
    )
    pieces: tuple[Piece, ...]


class Template(LenientModel):
    """Says how rows are rendered as text, and which checks the template passed."""

    choice: str
    reason: str
    checks: tuple[str, ...] = ()
    date: str = Field(default="", description="The day that the chat template writes as today's, as YYYY-MM-DD.")


class DataReport(LenientModel):
    """Combines the reports of all splits."""

    version: Literal[1] = 1
    unit: Literal["tokens", "characters"] = "tokens"
    max_sequence_length: int
    template: Template | None = None
    splits: tuple[SplitReport, ...]
    leaks: tuple[Leak, ...] = ()
    warnings: tuple[DataWarning, ...] = ()
    samples: tuple[RenderedSample, ...] = ()

    def of(self, split: SplitName) -> SplitReport | None:
        """Returns the report of a split; None if there is no such split."""
        return next((report for report in self.splits if report.split == split), None)
