"""DataReport: what the rows of a run turned out to be, before anything is trained on them.

Written by the trainer (preflight, rank 0 before training, `finetune validate --data`) as finetune/data-report.json;
read by the report page. Without a tokenizer, lengths are characters (`unit`) and the token figures are absent.

    {"version": 1, "unit": "tokens", "maxSequenceLength": 2048, "template": {"choice": "chat template", "reason": "…"},
     "splits": [{"split": "train", "rows": 1480, "read": 1500, "dropped": 20,
                 "droppedRows": [{"row": 17, "file": "", "reason": "completion is empty"}],
                 "files": [{"name": "train.jsonl", "container": "jsonl", "compression": "", "format": "messages", …}],
                 "duplicates": {"rows": 3, "groups": [[4, 90]]}, "tokens": 310221, "labelTokens": 90122,
                 "lengths": {"edges": [0, 32, …], "counts": [10, …], "minimum": 9, "median": 120.0, …}, …}],
     "leaks": [{"first": "train", "second": "test", "rows": 2, "prompts": 5, "examples": [[12, 3]]}],
     "warnings": [{"reason": "FewExamples", "message": "…"}],
     "samples": [{"split": "train", "row": 1, "pieces": [{"text": "<|user|>…", "learnt": false}, …]}]}

Shares are 0 to 1. Row numbers are a file's lines (JSON lines, CSV) or elements (JSON, parquet), from 1. Long lists are
cut to LISTED entries; the count beside them is of all.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.model import LenientModel

LISTED = 100
FEW_EXAMPLES = 1000

SplitName = Literal["train", "validation", "test"]


class FileReport(LenientModel):
    """A file that rows were read from."""

    name: str
    source: str = Field(default="", description="The URI in the spec that it belongs to.")
    container: Literal["jsonl", "json", "csv", "parquet"]
    compression: str = Field(default="", description="gzip, zstd, bz2, xz, or empty.")
    format: str = Field(default="", description="What its rows were read as; empty where no row could be read.")
    rows: int = Field(description="Usable rows.")
    dropped: int = 0
    weight: float = Field(default=1.0, description="How often a row is seen in an epoch.")


class DroppedRow(LenientModel):
    """A row that isn't trained on, and why."""

    row: int
    file: str = Field(default="", description="Empty where the split has one file.")
    reason: str


class Duplicates(LenientModel):
    """Rows whose whole content came before; `groups` list row numbers, first come first."""

    rows: int = 0
    groups: tuple[tuple[int, ...], ...] = ()


class Histogram(LenientModel):
    """Lengths of rows in the report's unit. `counts[i]` rows lie in edges[i] <= length < edges[i+1]; the last edge is
    within the last bin."""

    edges: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    minimum: int = 0
    mean: float = 0.0
    median: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    maximum: int = 0


class Truncated(LenientModel):
    """Rows longer than dataset.maxSequenceLength, cut at their end."""

    rows: int = 0
    tokens: int = Field(default=0, description="What was cut off, all rows together.")
    numbers: tuple[int, ...] = ()


class Shared(LenientModel):
    """What rows begin with alike (an instruction, a system prompt). An upper bound: it is computed once a
    micro-batch."""

    tokens: int = Field(default=0, description="Tokens that need not be computed again.")
    share: float = Field(default=0.0, description="Of all tokens.")


class SplitReport(LenientModel):
    """The rows of one purpose, after validation and test rows were held out."""

    split: SplitName
    files: tuple[FileReport, ...] = Field(default=(), description="Empty for a split held out of the training files.")
    held_out: bool = Field(default=False, description="Chosen from the training files by a fraction.")
    rows: int = Field(description="Usable rows.")
    examples: int = Field(description="Rows of an epoch: with weights, other than `rows`.")
    read: int = Field(description="Rows in the files; 0 where held out.")
    left_out: int = Field(default=0, description="Usable rows that a weight below 1 leaves out of every epoch.")
    dropped: int = 0
    unlabelled: int = Field(
        default=0, description="Of `dropped`: without a label, or without one that is sure enough. They refuse nothing."
    )
    dropped_rows: tuple[DroppedRow, ...] = ()
    duplicates: Duplicates = Field(default_factory=Duplicates)
    near_duplicates: Duplicates = Field(
        default_factory=Duplicates,
        description="Rows that differ from an earlier one only in case, spaces, punctuation or numbers.",
    )
    same_prompts: int = Field(default=0, description="Rows whose prompt came before with another answer.")
    characters: int = 0
    tokens: int | None = None
    label_tokens: int | None = Field(default=None, description="Tokens that are learnt.")
    label_share: float | None = Field(default=None, description="labelTokens / tokens.")
    lengths: Histogram = Field(default_factory=Histogram)
    answer_lengths: Histogram = Field(default_factory=Histogram, description="Of what is learnt in each row.")
    padding_share: float | None = Field(
        default=None, description="Of computed tokens, were rows padded in batches of 8 in random order. Packed: none."
    )
    truncated: Truncated = Field(default_factory=Truncated)
    shared: Shared = Field(default_factory=Shared)


class Leak(LenientModel):
    """Rows of one split that another holds too."""

    first: SplitName
    second: SplitName
    rows: int = Field(description="Rows of `second` whose whole content is in `first`.")
    prompts: int = Field(default=0, description="Rows of `second` whose prompt is in `first`; `rows` are among them.")
    near: int = Field(default=0, description="Other rows of `second` that are nearly a row of `first`.")
    examples: tuple[tuple[int, int], ...] = Field(default=(), description="Pairs of row numbers, whole rows only.")
    near_examples: tuple[tuple[int, int], ...] = Field(default=(), description="Pairs of those that are nearly alike.")


class Warning(LenientModel):
    """What a person should look at; nothing is refused for it."""

    reason: str = Field(
        description="FewExamples, Leaks, NearLeaks, Duplicates, NearDuplicates, Truncated, RowsDropped or Unlabelled."
    )
    message: str


class Piece(LenientModel):
    text: str
    learnt: bool


class RenderedSample(LenientModel):
    """A row as the model sees it; pieces one after the other are its text."""

    split: SplitName
    row: int
    file: str = ""
    tokens: int | None = None
    cut: bool = Field(default=False, description="Longer than is trained on, or than is shown here.")
    pieces: tuple[Piece, ...]


class Template(LenientModel):
    """How rows become text, and what was checked of it."""

    choice: str
    reason: str
    checks: tuple[str, ...] = ()


class DataReport(LenientModel):
    """Of all splits together."""

    version: Literal[1] = 1
    unit: Literal["tokens", "characters"] = "tokens"
    max_sequence_length: int
    template: Template | None = None
    splits: tuple[SplitReport, ...]
    leaks: tuple[Leak, ...] = ()
    warnings: tuple[Warning, ...] = ()
    samples: tuple[RenderedSample, ...] = ()

    def of(self, split: SplitName) -> SplitReport | None:
        return next((one for one in self.splits if one.split == split), None)
