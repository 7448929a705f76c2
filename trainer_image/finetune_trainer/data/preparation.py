"""Reads the files of a split, renders their rows, and refuses or drops rows that can't be used.

Rows come a few at a time and are written to files as numbers, so memory doesn't grow with the
split. The module doesn't import torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.messages.data_report import FileReport, Finding
from finetune_trainer.data import dedup
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.example import Example
from finetune_trainer.data.npy_writer import Column, NpyWriter
from finetune_trainer.data.reading import compression, rows
from finetune_trainer.data.reading.findings import Findings
from finetune_trainer.data.reading.row import Problem, Row
from finetune_trainer.data.reading.rows import InputFile
from finetune_trainer.errors import RunError

MAX_PROBLEMS = 10_000
"""The number of problems that are recorded; all of them are counted."""
# At most this many rows, or about this many characters, are rendered together.
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 1 << 18

COLUMNS: dict[str, Column] = {
    "ids": (np.int32, ()), "loss_mask": (np.bool_, ()), "offsets": (np.int64, ()), "line_numbers": (np.int64, ()),
    "file_index": (np.int32, ()), "sources": (np.int32, ()), "label_counts": (np.int64, ()),
    "uncut_lengths": (np.int64, ()), "characters": (np.int64, ()), "digests": (np.uint8, (16,)),
    "prompts": (np.uint8, (16,)), "near_duplicate_digests": (np.uint8, (16,)), "earlier": (np.bool_, ()),
}  # fmt: skip
"""The arrays that are written for a split; `token_cache.Tokens` describes them."""


@dataclass(frozen=True)
class ReadOptions:
    """Holds how the files of a split become examples.

    `field` is the field of the job that messages name (dataset.uri, ...). Without a renderer rows
    are only parsed, and lengths are characters. `on_invalid` is fail or drop. `heartbeat` is called
    regularly, and `opened` with each file, as messages name it, before it is read.
    """

    field: str
    renderer: Renderer | None
    on_invalid: str
    heartbeat: Callable[[], None] = lambda: None
    opened: Callable[[str], None] = lambda file: None


@dataclass(frozen=True)
class Examples:
    """Holds the usable rows, in the order of their files, as flat arrays and a report on each file.

    Without a renderer `ids` and `loss_mask` are empty, and lengths are characters.
    """

    arrays: dict[str, NDArray[Any]]
    files: tuple[FileReport, ...]
    problems: tuple[Problem, ...]
    dropped: int
    unlabelled: int  # of the dropped rows
    rendered: bool
    findings: tuple[Finding, ...] = ()

    def __len__(self) -> int:
        return len(self.arrays["line_numbers"])

    @property
    def tokens(self) -> int:
        """The number of tokens of all examples."""
        return len(self.arrays["ids"])

    @property
    def label_tokens(self) -> int:
        """The number of tokens that count in the loss."""
        return int(self.arrays["label_counts"].sum())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The length of each example in tokens, or in characters without a renderer."""
        return np.diff(self.arrays["offsets"]) if self.rendered else self.arrays["characters"]

    @property
    def truncated(self) -> int:
        """The number of examples that were longer than dataset.maxSequenceLength."""
        return int((self.arrays["uncut_lengths"] > self.lengths).sum())

    @property
    def duplicates(self) -> int:
        """The number of rows that repeat an earlier one."""
        digests = self.arrays["digests"][~self.arrays["earlier"]]
        return int((dedup.first_occurrence(digests) != np.arange(len(digests))).sum())

    @property
    def format(self) -> str:
        """The formats of the files."""
        return formats(self.files)


def formats(files: Iterable[FileReport]) -> str:
    """List the different formats of files, in the order in which they come first."""
    return ", ".join(dict.fromkeys(file.format for file in files if file.format))


def prepare(data: Path | Sequence[InputFile], options: ReadOptions, folder: Path | None = None) -> Examples:
    """Read and render the files of a split.

    A path stands for one file whose format is detected. The arrays are files in `folder`; without
    a folder they vanish with the last array that maps them.

    Raises RunError DatasetInvalid that numbers the unusable rows if `options.on_invalid` is fail,
    or if no row is usable, and RunError DatasetNotFound if there is no file.
    """
    files = (InputFile(data, data.name),) if isinstance(data, Path) else tuple(data)
    if not files or not all(file.path.is_file() for file in files):
        raise RunError("DatasetNotFound", f"{options.field}: no file was fetched; give the URI of a file of rows")
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="finetune-") as temporary:
            return _prepared(files, options, Path(temporary))
    return _prepared(files, options, folder)


def _prepared(files: tuple[InputFile, ...], options: ReadOptions, folder: Path) -> Examples:
    with NpyWriter(folder, COLUMNS) as writer:
        collected = _Collected(writer)
        for index, file in enumerate(files):
            _read_file(file, index, len(files) > 1, options, collected)
    if collected.dropped > collected.unlabelled and options.on_invalid == "fail":
        raise RunError("DatasetInvalid", _refusal(options.field, collected))
    if not collected.rows:
        reason = f" ({rows.listing(collected.problems)})" if collected.problems else "; the file is empty"
        raise RunError("DatasetInvalid", f"{options.field}: no usable row{reason}")
    return Examples(
        writer.arrays(),
        tuple(collected.files),
        tuple(collected.problems),
        collected.dropped,
        collected.unlabelled,
        options.renderer is not None,
        collected.findings.listed(),
    )


@dataclass
class _Collected:
    """Collects examples and problems. The arrays of the examples grow on disk."""

    writer: NpyWriter
    rows: int = 0
    tokens: int = 0
    files: list[FileReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    dropped: int = 0
    unlabelled: int = 0
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        self.writer.add("offsets", [0])

    def add(self, usable: Sequence[Row], examples: Sequence[Example] | None) -> None:
        """Add rows and their examples; without a renderer there are only rows.

        A row with several examples is there as often.
        """
        writer = self.writer
        characters = [_characters(row) for row in usable]
        if examples is None:
            writer.add("offsets", np.zeros(len(usable)))
            writer.add("sources", np.zeros(len(usable)))
            writer.add("label_counts", [_characters(row, ("assistant", "text")) for row in usable])
            writer.add("uncut_lengths", characters)
            writer.add("earlier", np.zeros(len(usable)))
            self.rows += len(usable)
        else:
            ends = self.tokens + np.cumsum([len(example.ids) for example in examples], dtype=np.int64)
            self.tokens = int(ends[-1]) if len(ends) else self.tokens
            writer.add("ids", [token for example in examples for token in example.ids])
            writer.add("loss_mask", [in_loss for example in examples for in_loss in example.loss_mask])
            writer.add("offsets", ends)
            writer.add("sources", [example.source for example in examples])
            writer.add("label_counts", [sum(example.loss_mask) for example in examples])
            writer.add("uncut_lengths", [max(example.uncut_length, len(example.ids)) for example in examples])
            earlier = [row is following for row, following in zip(usable, [*usable[1:], None], strict=False)]
            writer.add("earlier", earlier)
            self.rows += len(usable) - sum(earlier)
        writer.add("characters", characters)
        writer.add("line_numbers", [row.number for row in usable])
        writer.add("file_index", [row.file_index for row in usable])
        for name, digest in (
            ("digests", rows.digest),
            ("prompts", rows.prompt_digest),
            ("near_duplicate_digests", dedup.near_duplicate_digest),
        ):
            writer.add(name, np.frombuffer(b"".join(map(digest, usable)), np.uint8))

    def drop(self, problem: Problem) -> None:
        """Count an unusable row, and record its problem unless there are too many of its kind."""
        self.dropped += 1
        self.unlabelled += problem.unlabelled
        if (self.unlabelled if problem.unlabelled else self.dropped - self.unlabelled) <= MAX_PROBLEMS:
            self.problems.append(problem)


def _read_file(file: InputFile, index: int, named: bool, options: ReadOptions, collected: _Collected) -> None:
    options.opened(f"{options.field}: {file.name}")
    stream, file_format = rows.stream(file, options.field, file_index=index, named=named)
    rows_before, dropped_before = collected.rows, collected.dropped
    for batch in _batches(stream, options.heartbeat):
        _render(batch, options.renderer, collected, file.name if named else "")
    report = FileReport(
        name=file.name,
        source=file.source,
        container=file_format,
        compression=compression.kind(file.path),
        format=stream.format or "",
        rows=collected.rows - rows_before,
        dropped=collected.dropped - dropped_before,
        weight=file.weight,
    )
    collected.files.append(report)


def _render(batch: Sequence[Row | Problem], renderer: Renderer | None, collected: _Collected, file_name: str) -> None:
    parsed = [row for row in batch if isinstance(row, Row)]
    rendered = iter(renderer.render_all(parsed) if renderer else parsed)
    usable: list[Row] = []
    examples: list[Example] = []
    for row in batch:
        if isinstance(row, Problem):
            collected.drop(replace(row, file=file_name))
            continue
        outcome = next(rendered)
        if isinstance(outcome, Problem):
            collected.drop(replace(outcome, file=file_name))
            continue
        if row.unread:
            collected.findings.add(row.unread, row.number, file_name)
        if isinstance(outcome, Example):
            if outcome.omissions:
                collected.findings.add(outcome.omissions, outcome.number, file_name)
            usable += [row] * len(outcome.earlier)
            examples += outcome.earlier
            examples.append(outcome)
        usable.append(row)
    collected.add(usable, examples if renderer else None)


def _batches(stream: Iterable[Row | Problem], heartbeat: Callable[[], None]) -> Iterator[list[Row | Problem]]:
    """Yield a few rows at a time, of bounded size."""
    batch: list[Row | Problem] = []
    size = 0
    for row in stream:
        heartbeat()
        batch.append(row)
        size += _characters(row) if isinstance(row, Row) else 0
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(row: Row, roles: tuple[str, ...] | None = None) -> int:
    return sum(len(turn.content) for turn in row.turns if roles is None or turn.role in roles)


def rows_at(data: Sequence[InputFile], field: str, positions: Set[tuple[int, int]]) -> Iterator[Row]:
    """Yield the rows at the positions (file index, record number), in the order of the files.

    It reads no further than the last of them. `field` is as in ReadOptions.
    """
    remaining = len(positions)
    for index, file in enumerate(data):
        for row in rows.stream(file, field, file_index=index)[0]:
            if remaining == 0:
                return
            if isinstance(row, Row) and (index, row.number) in positions:
                remaining -= 1
                yield row


def _refusal(field: str, collected: _Collected) -> str:
    mistakes = [problem for problem in collected.problems if not problem.unlabelled]
    count = collected.dropped - collected.unlabelled
    subject = "1 row" if count == 1 else f"{count} rows"
    no_other = "" if collected.rows else ", and no other row is left"
    limit = f" (only the first {len(mistakes)} were recorded)" if count > len(mistakes) else ""
    listed = rows.listing(mistakes)
    return f"{field}: {subject} can't be used{no_other}: {listed}{limit}. Fix them, or set dataset.onInvalid: drop"
