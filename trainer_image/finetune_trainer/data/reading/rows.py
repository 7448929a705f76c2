"""Reads files of examples into typed rows, and reports by number which rows can't be used.

It never decides what happens to a bad row. `stream` holds one row at a time; `read` holds all of
them. The module needs no tokenizer and doesn't import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_api.spec.rendering import RenderingSpec
from finetune_trainer.data.reading import (
    dialogues,
    findings,
    labeling_tools,
    preference_rows,
    preference_shapes,
    records,
    row_formats,
)
from finetune_trainer.data.reading.dialects import shapes
from finetune_trainer.data.reading.labeling import column_hints, labeled_texts
from finetune_trainer.data.reading.record import Record, Unreadable
from finetune_trainer.data.reading.records import FileFormat
from finetune_trainer.data.reading.row import Problem, Row, Turn, Unlabelled, Values, short_repr
from finetune_trainer.errors import RunError

FORMATS = ("auto", *row_formats.FORMATS, *labeling_tools.FORMATS)
_NO_TURNS: tuple[Any, ...] = ("", [])
LISTED = 10
"""The number of problems that a message lists."""


@dataclass(frozen=True)
class InputFile:
    """Names a file of rows and how to read it.

    `name` is what messages call the file, and `source` is the URI that it comes from. `columns`
    maps our name of a key to the file's. `labels` and `min_label_probability` are those of the
    job's dataset. `weight` is how often each row of the file comes in an epoch.
    `rendering` is what the job wants of turns.
    """

    path: Path
    name: str = ""
    source: str = ""
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    min_label_probability: float = 0.0
    weight: float = 1.0
    rendering: RenderingSpec = field(default_factory=RenderingSpec)


@dataclass(frozen=True)
class Rows:
    """Holds the content of a file. `format` is None for a file without a readable row."""

    format: str | None
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    duplicates: int


class Stream:
    """Iterates over the rows and problems of a file, in the order of the file.

    `format` is None until a row has been read.
    """

    def __init__(
        self, records: Iterable[Record], input_file: InputFile, *, file_index: int = 0, named: bool = False
    ) -> None:
        self.format: str | None = None if input_file.format == "auto" else _checked_format(input_file.format)
        self._records = records
        self._input_file = input_file
        self._file_index = file_index
        self._name = input_file.name if named else ""

    def __iter__(self) -> Iterator[Row | Problem]:
        for number, value in self._records:
            if isinstance(value, str):
                yield Problem(number, value, self._name)
                continue
            try:
                record = self._record(value)
                row = self._row(number, record)
                unread = tuple(findings.unread(self.format or "", record))
                row = replace(row, file_index=self._file_index, unread=(*row.unread, *unread))
                yield dialogues.adjusted(row, self._input_file.rendering)
            except ValueError as error:
                message = self._of_other_format(value) or str(error)
                yield Problem(number, message, self._name, isinstance(error, Unlabelled))
            except RecursionError:
                yield Problem(number, "isn't a row (nested too deeply)", self._name)

    def _of_other_format(self, value: Mapping[str, Any]) -> str:
        """Return a message if a record has the keys of another format than those before it."""
        if self._input_file.format != "auto" or self.format is None or self._input_file.columns:
            return ""
        try:
            format = detect(labeled_texts.normalized(shapes.normalized(_without_nulls(value))))
        except ValueError:
            return ""
        if format == self.format or (format == "text" and self.format in labeling_tools.FORMATS):
            return ""
        return f"is a row of {format}, but those before it are rows of {self.format}; put it into a file of its own"

    def _record(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a record under the names that its format has; a null is an absent key."""
        file = self._input_file
        record = shapes.normalized(renamed(_without_nulls(value), file.columns))
        if file.format == "auto" and not file.columns:
            record = labeled_texts.normalized(record)
        if self.format is None:
            self.format = detect(record)
            if self.format == "text" and labeling_tools.is_snorkel(value):
                self.format = "snorkel"  # its first row has a null as its label
        return preference_shapes.normalized(record) if self.format == preference_rows.FORMAT else record

    def _row(self, number: int, value: Values) -> Row:
        if self.format is None:
            self.format = detect(value)
        if self.format in row_formats.FORMATS:
            return row_formats.FORMATS[self.format](number, value)
        file = self._input_file
        options = labeling_tools.Options(dict(file.columns), file.labels, file.min_label_probability)
        return labeling_tools.FORMATS[self.format](number, value, options)


def stream(file: InputFile, field: str, *, file_index: int = 0, named: bool = False) -> tuple[Stream, FileFormat]:
    """Return the rows of a file as a stream, and the format of the file.

    Messages name `field` (dataset.uri, ...) and, if `named`, the file. Raises RunError
    DatasetInvalid if the file can't be read, either immediately or while it is read.
    """
    try:
        file_format = records.file_format(file.path, file.name or file.path.name)
    except Unreadable as unreadable:
        raise _run_error(unreadable, file, field, named) from None
    numbered = _records(file, file_format, field, named)
    return Stream(numbered, file, file_index=file_index, named=named), file_format


def read(path: Path, format: str = "auto") -> Rows:
    """Read all rows and all problems of a file. It never raises for the content of a row."""
    rows, _ = stream(InputFile(path, path.name, format=format), "dataset.uri")
    return _collected(rows)


def parse(lines: Iterable[bytes], format: str = "auto") -> Rows:
    """Read JSON lines in the same way as `read`."""
    return _collected(Stream(records.json_lines(lines), InputFile(Path(), format=format)))


def digest(row: Row) -> bytes:
    """Return 16 bytes that identify the content of a row in any file.

    They must never change, because they decide which rows go to the validation and test splits.
    """
    content = [*_as_lists(row.turns), *([["rejected"], *_as_lists(row.rejected)] if row.rejected else [])]
    return _hash([*content, ["tools", row.tools]] if row.tools else content)


def prompt_digest(row: Row) -> bytes:
    """Return 16 bytes that identify a row without its answer, or a complete text."""
    return _hash(_as_lists(row.turns if row.is_text else row.turns[:-1]))


def listing(problems: Iterable[Problem]) -> str:
    """List the first ten problems as `row 3: ...; row 9: ...`, and count the rest."""
    ordered = sorted(problems, key=lambda problem: (problem.file, problem.number))
    listed = "; ".join(str(problem) for problem in ordered[:LISTED])
    more = len(ordered) - LISTED
    return f"{listed}; and {more} more" if more > 0 else listed


def detect(value: Values) -> str:
    """Return the format that the keys of a record have. Raises ValueError that names the keys."""
    if labeling_tools.is_label_studio(value):
        return "label-studio"
    if value.get("messages", "") not in _NO_TURNS:
        return "messages"
    if value.get("conversations", "") not in _NO_TURNS:
        return "sharegpt"
    if preference_shapes.is_pair(value):
        return preference_rows.FORMAT
    if "prompt" in value or "completion" in value:
        return "prompt-completion"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if labeling_tools.is_snorkel(value):
        return "snorkel"
    if "messages" in value or "conversations" in value:
        return "messages" if "messages" in value else "sharegpt"
    if "text" in value:
        if "role" in value:
            raise ValueError(
                f"has a text with a role ({short_repr(value['role'])}), which is one turn; write each dialogue as a "
                "row with messages, or set dataset.format: text"
            )
        return "text"
    raise ValueError(column_hints.unknown_keys(value))


def renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Return a record with our names for its keys.

    Raises ValueError for a column that is missing although the record has a key of our name; any
    other missing key is reported when it is needed.
    """
    if not columns:
        return value
    outer = {ours: theirs for ours, theirs in columns.items() if ours not in ("role", "content")}
    record = {key: inner for key, inner in value.items() if key not in outer and key not in outer.values()}
    for ours, theirs in outer.items():
        if theirs in value:
            record[ours] = value[theirs]
        elif ours in value and theirs not in value:
            raise ValueError(f"{theirs} is missing, which dataset.columns.{ours} names")
    for ours in ("messages", "conversations", "prompt", "completion"):
        if isinstance(record.get(ours), list) and ("role" in columns or "content" in columns):
            record[ours] = [_turn_renamed(turn, columns) for turn in record[ours]]
    return record


def _without_nulls(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record without the keys that have no value: null, or the NaN that pandas writes."""
    if not any(inner is None or inner != inner for inner in value.values()):
        return value
    return {key: inner for key, inner in value.items() if inner is not None and inner == inner}


def _turn_renamed(turn: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    inner = {columns[ours]: ours for ours in ("role", "content") if ours in columns}
    return {inner.get(key, key): value for key, value in turn.items()}


def _checked_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"dataset.format {name!r} isn't one of {', '.join(FORMATS)}")
    return name


def _collected(stream: Stream) -> Rows:
    rows: list[Row] = []
    problems: list[Problem] = []
    digests: set[bytes] = set()
    for item in stream:
        if isinstance(item, Row):
            rows.append(item)
            digests.add(digest(item))
        else:
            problems.append(item)
    return Rows(stream.format, tuple(rows), tuple(problems), len(rows) - len(digests))


def _records(file: InputFile, file_format: FileFormat, field: str, named: bool) -> Iterator[Record]:
    try:
        yield from records.records(file.path, file_format)
    except Unreadable as unreadable:
        raise _run_error(unreadable, file, field, named) from None


def _run_error(unreadable: Unreadable, file: InputFile, field: str, named: bool) -> RunError:
    name = f"{file.name} " if named else ""
    row = (
        f"row {unreadable.number}: "
        if unreadable.number
        else ("" if named or unreadable.message.startswith("the ") else "the file ")
    )
    rest = ", and nothing after it can be read" if unreadable.number else ""
    return RunError("DatasetInvalid", f"{field}: {name}{row}{unreadable.message}{rest}")


def _as_lists(turns: tuple[Turn, ...]) -> list[list[Any]]:
    return [
        [turn.role, turn.content, *([turn.more] if turn.more else []), *([0] if not turn.in_loss else [])]
        for turn in turns
    ]


def _hash(value: Any) -> bytes:
    serialized = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return hashlib.blake2b(serialized, digest_size=16).digest()
