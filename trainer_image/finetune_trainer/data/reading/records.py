"""Reads a file as numbered records (JSON objects).

A file holds JSON lines, a JSON array, CSV or parquet, and may be compressed. One record is held at
a time, of at most MAX_RECORD_BYTES; a longer one is reported by its number. The number of a record
is its line (JSON lines; CSV: the line on which it begins) or its position (JSON array, parquet),
from 1.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from finetune_trainer.data.reading import compression, parquet
from finetune_trainer.data.reading.compression import CorruptData, Readable
from finetune_trainer.data.reading.containers import arrow, encodings, foreign, json_text
from finetune_trainer.data.reading.json_array import READ_BYTES, json_values
from finetune_trainer.data.reading.record import MAX_RECORD_BYTES, Record, Unreadable, too_long

FileFormat = Literal["jsonl", "json", "csv", "parquet", "arrow"]
_BOM = codecs.BOM_UTF8
_DELIMITERS = ",\t;|"
_EXCEL = re.compile(r'"?sep=(.)"?\s*$')
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_DESCRIPTIONS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
COMPRESSION_SUFFIXES = ("", ".gz", ".zst", ".bz2", ".xz")


def is_named_as_data(name: str) -> bool:
    """Whether a file of a folder holds rows. `name` is its path within the folder.

    Its suffix decides, because a folder holds READMEs too. Hidden files and those in hidden folders
    are copies that a notebook or an operating system has left behind.
    """
    lower = name.lower()
    parts = lower.split("/")
    if any(part.startswith(".") for part in parts):
        return False
    if parts[-1] in _DESCRIPTIONS or (parts[-1].startswith("cache-") and lower.endswith(".arrow")):
        return False  # what `datasets` saves next to rows
    return any(lower.endswith(suffix + packed) for suffix in SUFFIXES for packed in COMPRESSION_SUFFIXES)


def file_format(path: Path, name: str) -> FileFormat:
    """Detect the format by the first bytes, and by the name if those leave it open.

    Raises Unreadable.
    """
    try:
        with compression.opened(path) as file:
            head = file.read(4096)
    except CorruptData as corrupt:
        raise Unreadable(0, str(corrupt)) from None
    if head.startswith(b"PAR1"):
        if compression.kind(path):
            raise Unreadable(0, "is parquet inside a compressed file; unpack it (parquet is compressed already)")
        return "parquet"
    if head.startswith((arrow.FILE_MAGIC, arrow.STREAM_MAGIC)):
        if compression.kind(path):
            raise Unreadable(0, "is Arrow inside a compressed file; unpack it")
        return "arrow"
    if message := foreign.refusal(head, name):
        raise Unreadable(0, message)
    if encoding := encodings.of_head(head):
        raise Unreadable(0, encodings.remedy(encoding))
    text = head.removeprefix(_BOM).lstrip()
    if not text.startswith((b"{", b"[")) and foreign.is_binary(head):
        raise Unreadable(0, foreign.BINARY)
    lower = name.lower()
    stem = next((lower.removesuffix(suffix) for suffix in COMPRESSION_SUFFIXES[1:] if lower.endswith(suffix)), lower)
    if stem.endswith((".csv", ".tsv")):
        return "csv"
    if _is_json(text, stem):
        return "json"
    if text.startswith((b"{", b"[")) or stem.endswith((".jsonl", ".ndjson", ".json")) or not text:
        return "jsonl"
    first = text.split(b"\n", 1)[0]
    if b"{" not in first and b'"' not in first and not any(first.count(mark.encode()) for mark in _DELIMITERS):
        raise Unreadable(0, foreign.no_rows(first))
    return "csv" if any(first.count(mark.encode()) for mark in _DELIMITERS) and b"{" not in first else "jsonl"


def _is_json(text: bytes, stem: str) -> bool:
    """Whether the beginning of a file is an array, or an object over several lines, instead of JSON
    lines.

    A line of JSON lines is a complete object.
    """
    line, _, rest = text.partition(b"\n")
    if text.startswith(b"["):
        return not stem.endswith((".jsonl", ".ndjson")) or not rest.strip() or not _is_complete(line)
    if not text.startswith(b"{") or _is_complete(line):
        return text.startswith(b"{") and stem.endswith(".json") and not rest.strip()
    is_open = line.strip() == b"{" and bool(rest.strip())
    return is_open or _holds_several(line) or (stem.endswith(".json") and not rest)


def _is_complete(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _holds_several(line: bytes) -> bool:
    """Whether a line begins with two objects without a line break between them."""
    try:
        text = line.decode(errors="replace")
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip().startswith("{")


def records(path: Path, format: FileFormat) -> Iterator[Record]:
    """Yield all records of a file. Raises Unreadable if the rest of it can't be read."""
    if format in ("parquet", "arrow"):
        yield from (parquet if format == "parquet" else arrow).records(path)
        return
    number = 0
    try:
        with compression.opened(path) as file:
            by_line = {"jsonl": json_lines, "csv": csv_rows}
            numbered = json_values(file) if format == "json" else by_line[format](lines(file))
            for number, value in numbered:
                yield number, value
    except CorruptData as corrupt:
        raise Unreadable(number + 1, str(corrupt)) from None


def lines(file: Readable) -> Iterator[bytes | None]:
    """Yield lines with their line breaks, and None for a line that is too long."""
    pending = b""
    skipping = False
    while piece := file.read(READ_BYTES):
        *complete, rest = (pending + piece).split(b"\n") if not skipping else piece.split(b"\n")
        if skipping and complete:
            yield None
            skipping = False
            complete = complete[1:]
        for line in complete:
            yield line + b"\n" if len(line) <= MAX_RECORD_BYTES else None
        pending = rest
        if skipping or len(pending) > MAX_RECORD_BYTES:
            pending, skipping = b"", True
    if skipping:
        yield None
    elif pending:
        yield pending


def json_lines(lines: Iterable[bytes | None]) -> Iterator[Record]:
    """Yield one object per line. Blank lines are counted, but they aren't records."""
    for number, line in enumerate(lines, start=1):
        if line is None:
            yield number, too_long("a line")
        elif line.strip():
            yield number, _object(line)


def csv_rows(lines: Iterable[bytes | None]) -> Iterator[Record]:
    """Yield the rows of a CSV file, whose first line names the columns.

    Raises Unreadable for a quote that is never closed, because the rows after it can't be
    separated.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    record_start = _RecordStart()
    text = _csv_lines(lines, record_start)
    head = next(text, None)
    if head is None:
        return
    delimiter = max(_DELIMITERS, key=head.count)
    if excel := _EXCEL.match(head):
        head, delimiter = "\n", excel.group(1)
    reader = csv.reader(
        _chained(head, text), delimiter=delimiter if excel or head.count(delimiter) else ",", strict=True
    )
    columns: list[str] | None = None
    while True:
        number = reader.line_num + 1
        record_start.line = reader.line_num
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Unreadable(number, f"isn't CSV ({error}); {_remedy(error)}") from None
        if columns is None and values:
            columns = [name.strip() for name in values]
            repeated = next((name for index, name in enumerate(columns) if name in columns[:index]), None)
            if repeated:
                raise Unreadable(number, f"the first line names the column {repeated!r} twice")
        elif columns is not None and len(values) == len(columns):
            yield number, dict(_named(columns, values))
        elif columns is not None and values:
            yield number, f"has {len(values)} fields, but the first line names {len(columns)} columns"


def _named(columns: Sequence[str], values: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the fields of a row with their names. The column of row numbers that pandas writes has
    none, and is passed over."""
    for position, (name, value) in enumerate(zip(columns, values, strict=True), start=1):
        if name or not (value.isdecimal() or not value):
            yield name or f"column {position}", value


def _remedy(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "its lines end with a carriage return; save it with line feeds"
    return "is a quote left open, or written with a backslash? Write two quotes for one inside a field"


class _RecordStart:
    """The number of lines before the current CSV record, which may extend over several lines."""

    line = 0


def _csv_lines(lines: Iterable[bytes | None], record_start: _RecordStart) -> Iterator[str]:
    record_bytes = 0
    for number, line in enumerate(lines, start=1):
        record_bytes = len(line or b"") + (record_bytes if number > record_start.line + 1 else 0)
        if line is None or record_bytes > MAX_RECORD_BYTES:
            raise Unreadable(number, too_long("a record"))
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable(number, encodings.not_utf8(line, error.start)) from None
        if "\x00" in text:
            raise Unreadable(number, "contains a NUL character; is it UTF-16? Save it as UTF-8")
        yield text


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return encodings.not_utf8(line, error.start)
    if not text.strip():
        return "is empty (it has only a byte order mark)"
    try:
        value = json_text.exact(json_text.decode(text), text)
    except json.JSONDecodeError as error:
        return f"isn't JSON ({error.msg} at column {error.colno}){json_text.hint(error)}"
    except RecursionError:
        return "isn't a row (nested too deeply)"
    except ValueError as error:
        return json_text.refusal(error)
    return value if isinstance(value, dict) else json_text.no_object(value)
