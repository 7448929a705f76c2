"""Reads files of examples into typed rows, and says by number which rows can't be used. No torch, no tokenizer.

Called by `examples` (preflight and rank 0 of a node). Never decides what happens to a bad row. `stream` holds one row
at a time; `read` all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_trainer import containers, exports, pairs
from finetune_trainer.containers import Container, Record, Unreadable
from finetune_trainer.failure import Failed
from finetune_trainer.shapes import ROLES, SHAPES, Row, Turn, Values

__all__ = ["ROLES", "Input", "Problem", "Row", "Rows", "Stream", "Turn", "listing", "parse", "read"]

FORMATS = ("auto", *SHAPES, *exports.SHAPES)
SHOWN = 10


@dataclass(frozen=True)
class Input:
    """A file of rows and how to read it. `columns`: our name of a key → the file's. `name` as messages have it."""

    path: Path
    name: str = ""
    source: str = ""
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    sure: float = 0.0  # dataset.minLabelProbability
    weight: float = 1.0


@dataclass(frozen=True)
class Problem:
    """Why a row can't be used. `file` is empty where there is only one. `unlabelled` is no mistake, see `exports`."""

    number: int
    message: str
    file: str = ""
    unlabelled: bool = False

    def __str__(self) -> str:
        return f"{f'{self.file} ' if self.file else ''}row {self.number}: {self.message}"


@dataclass(frozen=True)
class Rows:
    """What a file holds. `format` is None for a file without a readable row."""

    format: str | None
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    duplicates: int


class Stream:
    """The rows and problems of a file, in its order. `format` is known once a row was readable."""

    def __init__(self, records: Iterable[Record], given: Input, *, file: int = 0, named: bool = False) -> None:
        self.format: str | None = None if given.format == "auto" else _known(given.format)
        self._records = records
        self._given = given
        self._file = file
        self._name = given.name if named else ""

    def __iter__(self) -> Iterator[Row | Problem]:
        for number, value in self._records:
            if isinstance(value, str):
                yield Problem(number, value, self._name)
                continue
            try:
                yield replace(self._row(number, renamed(value, self._given.columns)), file=self._file)
            except ValueError as error:
                yield Problem(number, str(error), self._name, isinstance(error, exports.Unlabelled))
            except RecursionError:
                yield Problem(number, "isn't a row (nested too deeply)", self._name)

    def _row(self, number: int, value: Values) -> Row:
        if self.format is None:
            self.format = detect(value)
        if self.format in SHAPES:
            return SHAPES[self.format](number, value)
        return exports.SHAPES[self.format](
            number, value, exports.Options(dict(self._given.columns), self._given.labels, self._given.sure)
        )


def stream(given: Input, where: str, *, file: int = 0, named: bool = False) -> tuple[Stream, Container]:
    """The rows of a file. `where` is the field that messages name; with `named` they name the file too.

    Raises Failed DatasetInvalid at once, or while it is read, where the rest of the file can't be read.
    """
    try:
        held = containers.container(given.path, given.name or given.path.name)
    except Unreadable as unreadable:
        raise _failed(unreadable, given, where, named) from None
    return Stream(_translated(given, held, where, named), given, file=file, named=named), held


def read(path: Path, format: str = "auto") -> Rows:
    """All rows of a file and all problems; never raises for what a row holds."""
    found, _ = stream(Input(path, path.name, format=format), "dataset.uri")
    return _collected(found)


def parse(lines: Iterable[bytes], format: str = "auto") -> Rows:
    """As `read`, of JSON lines."""
    return _collected(Stream(containers.json_lines(lines), Input(Path(), format=format)))


def digest(row: Row) -> bytes:
    """16 bytes that stand for a row's content, whichever file it is in. Never changes: splits are chosen by it."""
    said = [*_said(row.turns), *([["rejected"], *_said(row.rejected)] if row.rejected else [])]
    return _hashed([*said, ["tools", row.tools]] if row.tools else said)


def prompt_digest(row: Row) -> bytes:
    """Of all but the answer; of a text's whole."""
    return _hashed(_said(row.turns if row.is_text else row.turns[:-1]))


def listing(problems: Iterable[Problem]) -> str:
    """`row 3: …; row 9: …` with the first ten, and how many more there are."""
    ordered = sorted(problems, key=lambda problem: (problem.file, problem.number))
    shown = "; ".join(str(problem) for problem in ordered[:SHOWN])
    more = len(ordered) - SHOWN
    return f"{shown}; and {more} more" if more > 0 else shown


def detect(value: Values) -> str:
    """The format that a record's keys have. Raises ValueError that names the keys."""
    if exports.is_label_studio(value):
        return "label-studio"
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        return "sharegpt"
    if pairs.is_pair(value):
        return pairs.FORMAT
    if "prompt" in value or "completion" in value:
        return "prompt-completion"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if exports.is_snorkel(value):
        return "snorkel"
    if "text" in value:
        return "text"
    keys = ", ".join(sorted(value)[:8]) or "none"
    raise ValueError(
        f"has neither prompt and completion nor messages, text, instruction and output, or conversations (its keys: "
        f"{keys}); say with dataset.columns which key is which"
    )


def renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A record with our names for its keys. A key that isn't there is told when it is needed."""
    if not columns:
        return value
    outer = {ours: theirs for ours, theirs in columns.items() if ours not in ("role", "content")}
    found = {key: inner for key, inner in value.items() if key not in outer and key not in outer.values()}
    for ours, theirs in outer.items():
        if theirs in value:
            found[ours] = value[theirs]
        elif ours in value and theirs not in value:
            raise ValueError(f"{theirs} is missing, which dataset.columns.{ours} names")
    for ours in ("messages", "conversations", "prompt", "completion"):
        if isinstance(found.get(ours), list) and ("role" in columns or "content" in columns):
            found[ours] = [_turn_renamed(turn, columns) for turn in found[ours]]
    return found


def _turn_renamed(turn: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    inner = {columns[ours]: ours for ours in ("role", "content") if ours in columns}
    return {inner.get(key, key): value for key, value in turn.items()}


def _known(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"dataset.format {name!r} isn't one of {', '.join(FORMATS)}")
    return name


def _collected(found: Stream) -> Rows:
    rows: list[Row] = []
    problems: list[Problem] = []
    seen: set[bytes] = set()
    for one in found:
        if isinstance(one, Row):
            rows.append(one)
            seen.add(digest(one))
        else:
            problems.append(one)
    return Rows(found.format, tuple(rows), tuple(problems), len(rows) - len(seen))


def _translated(given: Input, held: Container, where: str, named: bool) -> Iterator[Record]:
    try:
        yield from containers.records(given.path, held)
    except Unreadable as unreadable:
        raise _failed(unreadable, given, where, named) from None


def _failed(unreadable: Unreadable, given: Input, where: str, named: bool) -> Failed:
    at = f"{given.name} " if named else ""
    row = f"row {unreadable.number}: " if unreadable.number else ("" if named else "the file ")
    rest = ", and nothing behind it can be read" if unreadable.number else ""
    return Failed("DatasetInvalid", f"{where}: {at}{row}{unreadable.message}{rest}")


def _said(turns: tuple[Turn, ...]) -> list[list[Any]]:
    return [
        [turn.role, turn.content, *([turn.more] if turn.more else []), *([0] if not turn.learnt else [])]
        for turn in turns
    ]


def _hashed(value: Any) -> bytes:
    whole = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return hashlib.blake2b(whole, digest_size=16).digest()
