"""A split's files → examples ready for the plan: read, render, refuse or drop. No torch.

Called by preflight (to find bad rows before hardware is taken) and, through `tokens`, by local rank 0 of a node. Rows
come a few at a time and leave as numbers in files, so memory doesn't grow with the split.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.data_report import FileReport
from finetune_trainer import alike, compression, rows
from finetune_trainer.failure import Failed
from finetune_trainer.render import Example, Renderer
from finetune_trainer.rows import Input, Problem, Row
from finetune_trainer.spool import Column, Spool

MOST_PROBLEMS = 10_000  # kept; all are counted
_TOGETHER = 256  # rows that are rendered together,
_CHARACTERS = 1 << 18  # and where these are more, fewer rows

COLUMNS: dict[str, Column] = {
    "ids": (np.int32, ()), "learnt": (np.bool_, ()), "offsets": (np.int64, ()), "numbers": (np.int64, ()),
    "origins": (np.int32, ()), "sources": (np.int32, ()), "answers": (np.int64, ()), "whole": (np.int64, ()),
    "characters": (np.int64, ()), "digests": (np.uint8, (16,)), "prompts": (np.uint8, (16,)),
    "folded": (np.uint8, (16,)),
}  # fmt: skip
"""What is written of a split, see `tokens.Tokens`."""


@dataclass(frozen=True)
class Examples:
    """Usable rows in the files' order as flat arrays, and what was found on the way. Without a renderer `ids` and
    `learnt` are empty, and lengths are characters."""

    arrays: dict[str, NDArray[Any]]
    files: tuple[FileReport, ...]
    problems: tuple[Problem, ...]
    dropped: int
    unlabelled: int  # of those
    rendered: bool

    def __len__(self) -> int:
        return len(self.arrays["numbers"])

    @property
    def tokens(self) -> int:
        return len(self.arrays["ids"])

    @property
    def label_tokens(self) -> int:
        return int(self.arrays["answers"].sum())

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.arrays["offsets"]) if self.rendered else self.arrays["characters"]

    @property
    def truncated(self) -> int:
        return int((self.arrays["whole"] > self.lengths).sum())

    @property
    def duplicates(self) -> int:
        return int((alike.first(self.arrays["digests"]) != np.arange(len(self))).sum())

    @property
    def format(self) -> str:
        return formats(self.files)


def formats(files: Iterable[FileReport]) -> str:
    return ", ".join(dict.fromkeys(file.format for file in files if file.format))


def prepare(
    data: Path | Sequence[Input],
    where: str,
    *,
    renderer: Renderer | None,
    on_invalid: str,
    format: str = "auto",
    alive: Callable[[], None] = lambda: None,
    folder: Path | None = None,
) -> Examples:
    """Raises Failed DatasetInvalid that numbers the rows; `where` (dataset.uri, …) says which split it is.

    A path is one file of that format. `alive` is called for each row. Without a renderer only shapes are checked.
    The arrays are files in `folder`; without one they vanish with the last that reads them.
    """
    files = (Input(data, data.name, format=format),) if isinstance(data, Path) else tuple(data)
    if not files or not all(file.path.is_file() for file in files):
        raise Failed("DatasetNotFound", f"{where}: no file was fetched; give the URI of a file of rows")
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="finetune-") as own:
            return _prepared(files, where, renderer, on_invalid, alive, Path(own))
    return _prepared(files, where, renderer, on_invalid, alive, folder)


def _prepared(
    files: tuple[Input, ...],
    where: str,
    renderer: Renderer | None,
    on_invalid: str,
    alive: Callable[[], None],
    folder: Path,
) -> Examples:
    with Spool(folder, COLUMNS) as spool:
        found = _Found(spool)
        for index, file in enumerate(files):
            _take(file, index, len(files) > 1, where, renderer, found, alive)
    if found.dropped > found.unlabelled and on_invalid == "fail":
        raise Failed("DatasetInvalid", _refusal(where, found))
    if not found.rows:
        why = f" ({rows.listing(found.problems)})" if found.problems else "; the file is empty"
        raise Failed("DatasetInvalid", f"{where}: no usable row{why}")
    return Examples(
        spool.arrays(), tuple(found.files), tuple(found.problems), found.dropped, found.unlabelled, renderer is not None
    )


@dataclass
class _Found:
    """Grows by some rows at a time."""

    spool: Spool
    rows: int = 0
    tokens: int = 0
    files: list[FileReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    dropped: int = 0
    unlabelled: int = 0

    def __post_init__(self) -> None:
        self.spool.add("offsets", [0])

    def add(self, chosen: Sequence[Row], examples: Sequence[Example] | None) -> None:
        """Without examples only what rows say."""
        spool = self.spool
        characters = [_characters(row) for row in chosen]
        if examples is None:
            spool.add("offsets", np.zeros(len(chosen)))
            spool.add("sources", np.zeros(len(chosen)))
            spool.add("answers", [_characters(row, ("assistant", "text")) for row in chosen])
            spool.add("whole", characters)
        else:
            ends = self.tokens + np.cumsum([len(one.ids) for one in examples], dtype=np.int64)
            self.tokens = int(ends[-1]) if len(ends) else self.tokens
            spool.add("ids", [token for one in examples for token in one.ids])
            spool.add("learnt", [flag for one in examples for flag in one.learnt])
            spool.add("offsets", ends)
            spool.add("sources", [one.source for one in examples])
            spool.add("answers", [sum(one.learnt) for one in examples])
            spool.add("whole", [max(one.whole, len(one.ids)) for one in examples])
        spool.add("characters", characters)
        spool.add("numbers", [row.number for row in chosen])
        spool.add("origins", [row.file for row in chosen])
        for name, digest in (("digests", rows.digest), ("prompts", rows.prompt_digest), ("folded", alike.folded)):
            spool.add(name, np.frombuffer(b"".join(map(digest, chosen)), np.uint8))
        self.rows += len(chosen)

    def drop(self, problem: Problem) -> None:
        self.dropped += 1
        self.unlabelled += problem.unlabelled
        if (self.unlabelled if problem.unlabelled else self.dropped - self.unlabelled) <= MOST_PROBLEMS:
            self.problems.append(problem)


def _take(
    file: Input,
    index: int,
    named: bool,
    where: str,
    renderer: Renderer | None,
    found: _Found,
    alive: Callable[[], None],
) -> None:
    stream, held = rows.stream(file, where, file=index, named=named)
    before, dropped = found.rows, found.dropped
    for some in _together(stream, alive):
        _add(some, renderer, found, file.name if named else "")
    report = FileReport(
        name=file.name,
        source=file.source,
        container=held,
        compression=compression.kind(file.path),
        format=stream.format or "",
        rows=found.rows - before,
        dropped=found.dropped - dropped,
        weight=file.weight,
    )
    found.files.append(report)


def _add(some: Sequence[Row | Problem], renderer: Renderer | None, found: _Found, name: str) -> None:
    usable = [row for row in some if isinstance(row, Row)]
    rendered = iter(renderer.render_all(usable) if renderer else usable)
    kept: list[Row] = []
    examples: list[Example] = []
    for row in some:
        one = row if isinstance(row, Problem) else next(rendered)
        if isinstance(one, Problem):
            found.drop(replace(one, file=name))
            continue
        if isinstance(row, Row):
            kept.append(row)
        if isinstance(one, Example):
            examples.append(one)
    found.add(kept, examples if renderer else None)


def _together(stream: Iterable[Row | Problem], alive: Callable[[], None]) -> Iterator[list[Row | Problem]]:
    """A few rows at a time, of bounded size."""
    some: list[Row | Problem] = []
    size = 0
    for row in stream:
        alive()
        some.append(row)
        size += _characters(row) if isinstance(row, Row) else 0
        if len(some) == _TOGETHER or size >= _CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some


def _characters(row: Row, roles: tuple[str, ...] | None = None) -> int:
    return sum(len(turn.content) for turn in row.turns if roles is None or turn.role in roles)


def chosen(data: Sequence[Input], where: str, places: Set[tuple[int, int]]) -> Iterator[Row]:
    """The rows at (file, number), in the files' order; reads no further than the last of them."""
    left = len(places)
    for index, file in enumerate(data):
        for row in rows.stream(file, where, file=index)[0]:
            if left == 0:
                return
            if isinstance(row, Row) and (index, row.number) in places:
                left -= 1
                yield row


def _refusal(where: str, found: _Found) -> str:
    mistakes = [problem for problem in found.problems if not problem.unlabelled]
    count = found.dropped - found.unlabelled
    what = "1 row" if count == 1 else f"{count} rows"
    none = "" if found.rows else ", and no other row is left"
    also = f" (only the first {len(mistakes)} were kept)" if count > len(mistakes) else ""
    listed = rows.listing(mistakes)
    return f"{where}: {what} can't be used{none}: {listed}{also}. Mend them, or set dataset.onInvalid: drop"
