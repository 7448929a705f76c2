"""A split's files → examples ready for the plan: read, render, refuse or drop. No torch.

Called by preflight (to find bad rows before hardware is taken) and, through `tokens`, by local rank 0 of a node. Rows
come one at a time and leave as numbers in flat arrays, so memory is that of the tokens, four bytes each.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.data_report import FileReport
from finetune_trainer import compression, rows
from finetune_trainer.failure import Failed
from finetune_trainer.render import Example, Renderer
from finetune_trainer.rows import Input, Problem, Row

MOST_PROBLEMS = 10_000  # kept; all are counted


@dataclass(frozen=True)
class Examples:
    """Usable rows in the files' order as flat arrays, and what was found on the way. Without a renderer `ids` and
    `learnt` are empty, and lengths are characters."""

    arrays: dict[str, NDArray[Any]]
    files: tuple[FileReport, ...]
    problems: tuple[Problem, ...]
    dropped: int

    def __len__(self) -> int:
        return len(self.arrays["numbers"])

    @property
    def tokens(self) -> int:
        return len(self.arrays["ids"])

    @property
    def label_tokens(self) -> int:
        return int(self.arrays["learnt"].sum())

    @property
    def longest(self) -> int:
        return int(np.diff(self.arrays["offsets"]).max(initial=0))

    @property
    def truncated(self) -> int:
        return int((self.arrays["whole"] > self.arrays["lengths"]).sum())

    @property
    def duplicates(self) -> int:
        return len(self) - len(np.unique(self.arrays["digests"], axis=0))

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
) -> Examples:
    """Raises Failed DatasetInvalid that numbers the rows; `where` (dataset.uri, …) says which split it is.

    A path is one file of that format. `alive` is called for each row. Without a renderer only shapes are checked.
    """
    files = (Input(data, data.name, format=format),) if isinstance(data, Path) else tuple(data)
    if not files or not all(file.path.is_file() for file in files):
        raise Failed("DatasetNotFound", f"{where}: no file was fetched; give the URI of a file of rows")
    found = _Found()
    for index, file in enumerate(files):
        _take(file, index, len(files) > 1, where, renderer, found, alive)
    if found.dropped and on_invalid == "fail":
        raise Failed("DatasetInvalid", _refusal(where, found))
    if not len(found.numbers):
        why = f" ({rows.listing(found.problems)})" if found.problems else "; the file is empty"
        raise Failed("DatasetInvalid", f"{where}: no usable row{why}")
    return Examples(found.arrays(), tuple(found.files), tuple(found.problems), found.dropped)


@dataclass
class _Found:
    """Grows by a row at a time."""

    ids: Any = field(default_factory=lambda: array("i"))
    learnt: bytearray = field(default_factory=bytearray)
    lengths: Any = field(default_factory=lambda: array("q"))
    answers: Any = field(default_factory=lambda: array("q"))
    whole: Any = field(default_factory=lambda: array("q"))
    characters: Any = field(default_factory=lambda: array("q"))
    numbers: Any = field(default_factory=lambda: array("q"))
    origins: Any = field(default_factory=lambda: array("i"))
    sources: Any = field(default_factory=lambda: array("i"))
    digests: bytearray = field(default_factory=bytearray)
    prompts: bytearray = field(default_factory=bytearray)
    files: list[FileReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    dropped: int = 0

    def add(self, row: Row, example: Example | None) -> None:
        characters = sum(len(turn.content) for turn in row.turns)
        if example is None:
            self.lengths.append(characters)
            self.answers.append(sum(len(turn.content) for turn in row.turns if turn.role in ("assistant", "text")))
            self.whole.append(characters)
        else:
            self.ids.extend(example.ids)
            self.learnt.extend(example.learnt)
            self.lengths.append(len(example.ids))
            self.answers.append(sum(example.learnt))
            self.whole.append(max(example.whole, len(example.ids)))
        self.characters.append(characters)
        self.numbers.append(row.number)
        self.origins.append(row.file)
        self.sources.append(example.source if example else 0)
        self.digests += rows.digest(row)
        self.prompts += rows.prompt_digest(row)

    def drop(self, problem: Problem) -> None:
        self.dropped += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)

    def arrays(self) -> dict[str, NDArray[Any]]:
        lengths = np.array(self.lengths, np.int64)
        return {
            "ids": np.array(self.ids, np.int32),
            "learnt": np.frombuffer(bytes(self.learnt), np.bool_),
            "offsets": np.concatenate([[0], np.cumsum(lengths if len(self.ids) else 0 * lengths)]),
            "lengths": lengths,
            "answers": np.array(self.answers, np.int64),
            "whole": np.array(self.whole, np.int64),
            "characters": np.array(self.characters, np.int64),
            "numbers": np.array(self.numbers, np.int64),
            "origins": np.array(self.origins, np.int32),
            "sources": np.array(self.sources, np.int32),
            "digests": np.frombuffer(bytes(self.digests), np.uint8).reshape(-1, 16),
            "prompts": np.frombuffer(bytes(self.prompts), np.uint8).reshape(-1, 16),
        }


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
    before, dropped = len(found.numbers), found.dropped
    for row in stream:
        alive()
        rendered = _rendered(row, renderer)
        if isinstance(rendered, Problem):
            found.drop(Problem(rendered.number, rendered.message, file.name if named else ""))
        else:
            found.add(*rendered)
    report = FileReport(
        name=file.name,
        source=file.source,
        container=held,
        compression=compression.kind(file.path),
        format=stream.format or "",
        rows=len(found.numbers) - before,
        dropped=found.dropped - dropped,
        weight=file.weight,
    )
    found.files.append(report)


def _rendered(row: Row | Problem, renderer: Renderer | None) -> tuple[Row, Example | None] | Problem:
    if isinstance(row, Problem):
        return row
    if renderer is None:
        return row, None
    rendered = renderer.render(row)
    return rendered if isinstance(rendered, Problem) else (row, rendered)


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
    what = "1 row" if found.dropped == 1 else f"{found.dropped} rows"
    none = "" if len(found.numbers) else ", and no other row is left"
    listed = rows.listing(found.problems)
    more = found.dropped - len(found.problems)
    also = f" (only the first {len(found.problems)} were kept)" if more else ""
    return f"{where}: {what} can't be used{none}: {listed}{also}. Mend them, or set dataset.onInvalid: drop"
