"""A file → numbered records (JSON objects), whatever holds them: JSON lines, a JSON array, CSV, parquet; compressed
or not. Called by `rows`. Holds one record at a time: MOST_BYTES bounds it, and a longer one is told by its number.

A record's number is its line (JSON lines, CSV: the line it begins at) or its place (JSON array, parquet), from 1.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from finetune_trainer import compression
from finetune_trainer.compression import Broken, Readable

Container = Literal["jsonl", "json", "csv", "parquet"]
MOST_BYTES = 16 << 20
_PIECE = 1 << 20
_BOM = codecs.BOM_UTF8
_DELIMITERS = ",\t;|"
_BLANK = re.compile(r"[ \t\r\n]*")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED_SUFFIXES = ("", ".gz", ".zst", ".bz2", ".xz")

Record = tuple[int, dict[str, Any] | str]
"""(number, the object or why there is none)"""


class Unreadable(Exception):
    """Nothing behind this place can be read. `number` is 0 where it is about the whole file."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.message = message


def is_named_as_data(name: str) -> bool:
    """Whether a file of a folder is meant: by its ending, since a folder holds READMEs too."""
    lower = name.lower()
    return any(lower.endswith(suffix + packed) for suffix in SUFFIXES for packed in PACKED_SUFFIXES)


def container(path: Path, name: str) -> Container:
    """By the first bytes, and by the name where those leave it open. Raises Unreadable."""
    try:
        with compression.opened(path) as file:
            head = file.read(4096)
    except Broken as broken:
        raise Unreadable(0, str(broken)) from None
    if head.startswith(b"PAR1"):
        if compression.kind(path):
            raise Unreadable(0, "is parquet inside a compressed file; unpack it (parquet compresses by itself)")
        return "parquet"
    if head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        raise Unreadable(0, "is an archive of several files; unpack it, and give a folder or a single file")
    text = head.removeprefix(_BOM).lstrip()
    plain = next((name.lower().removesuffix(p) for p in PACKED_SUFFIXES[1:] if name.lower().endswith(p)), name.lower())
    if plain.endswith((".csv", ".tsv")):
        return "csv"
    if text.startswith(b"[") and not plain.endswith((".jsonl", ".ndjson")):
        return "json"
    if text.startswith((b"{", b"[")) or plain.endswith((".jsonl", ".ndjson", ".json")) or not text:
        return "jsonl"
    first = text.split(b"\n", 1)[0]
    return "csv" if any(first.count(mark.encode()) for mark in _DELIMITERS) and b"{" not in first else "jsonl"


def records(path: Path, held: Container) -> Iterator[Record]:
    """All of a file. Raises Unreadable where the rest can't be read."""
    if held == "parquet":
        from finetune_trainer import parquet

        yield from parquet.records(path)
        return
    number = 0
    try:
        with compression.opened(path) as file:
            of_lines = {"jsonl": json_lines, "csv": csv_rows}
            found = json_array(file) if held == "json" else of_lines[held](lines(file))
            for number, value in found:
                yield number, value
    except Broken as broken:
        raise Unreadable(number + 1, str(broken)) from None


def lines(file: Readable) -> Iterator[bytes | None]:
    """Lines with their ends; None for one of more than MOST_BYTES, which is skipped without being held."""
    pending = b""
    skipping = False
    while piece := file.read(_PIECE):
        *whole, rest = (pending + piece).split(b"\n") if not skipping else piece.split(b"\n")
        if skipping and whole:
            yield None
            skipping = False
            whole = whole[1:]
        for line in whole:
            yield line + b"\n" if len(line) <= MOST_BYTES else None
        pending = rest
        if skipping or len(pending) > MOST_BYTES:
            pending, skipping = b"", True
    if skipping:
        yield None
    elif pending:
        yield pending


def json_lines(found: Iterable[bytes | None]) -> Iterator[Record]:
    """One object a line; blank lines count, and are no records."""
    for number, line in enumerate(found, start=1):
        if line is None:
            yield number, _too_long("a line")
        elif line.strip():
            yield number, _object(line)


def json_array(file: Readable) -> Iterator[Record]:
    """The elements of one array, one after the other."""
    decode = json.JSONDecoder().raw_decode
    text = _Text(file)
    text.skip("[")
    number = 0
    while True:
        number += 1
        following = text.next_sign(number)
        if following == "]":
            if text.rest():
                raise Unreadable(number, "there is something behind the array's end")
            return
        if number > 1:
            if following != ",":
                raise Unreadable(number, f"isn't JSON (a comma is missing before {following!r})")
            text.skip(",")
            text.next_sign(number)
        value, problem = text.element(decode, number)
        if problem or not isinstance(value, dict):
            yield number, problem or "isn't a JSON object"
        else:
            yield number, value


def csv_rows(found: Iterable[bytes | None]) -> Iterator[Record]:
    """The first line names the columns. An unclosed quote ends the file: what follows it can't be told apart."""
    csv.field_size_limit(MOST_BYTES)
    place = _Place()
    text = _csv_lines(found, place)
    head = next(text, None)
    if head is None:
        return
    delimiter = max(_DELIMITERS, key=head.count)
    reader = csv.reader(_chained(head, text), delimiter=delimiter if head.count(delimiter) else ",", strict=True)
    columns: list[str] | None = None
    while True:
        number = reader.line_num + 1
        place.begin = reader.line_num
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Unreadable(number, f"isn't CSV ({error}); is a quote left open?") from None
        if columns is None:
            columns = [name.strip() for name in values]
            wrong = next((n for i, n in enumerate(columns) if n in columns[:i]), None)
            if wrong:
                raise Unreadable(number, f"the first line names the column {wrong!r} twice")
        elif len(values) == len(columns):
            yield number, {name: value for name, value in zip(columns, values, strict=True) if name}
        elif values:
            yield number, f"has {len(values)} fields, and the first line names {len(columns)} columns"


class _Place:
    begin = 0


def _csv_lines(found: Iterable[bytes | None], place: _Place) -> Iterator[str]:
    held = 0
    for number, line in enumerate(found, start=1):
        held = len(line or b"") + (held if number > place.begin + 1 else 0)
        if line is None or held > MOST_BYTES:
            raise Unreadable(number, _too_long("a record"))
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable(number, f"isn't UTF-8 (byte {error.start})") from None
        if "\x00" in text:
            raise Unreadable(number, "holds a NUL character; is it UTF-16? Save it as UTF-8")
        yield text


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _too_long(what: str) -> str:
    return f"{what} has more than {MOST_BYTES >> 20} MiB; a row is one example: split it"


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"isn't UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        return f"isn't JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "isn't a row (nested too deeply)"
    except ValueError as error:
        return f"isn't a row ({error})"
    return value if isinstance(value, dict) else "isn't a JSON object"


class _Text:
    """A window on a stream of UTF-8 text that moves on, and holds one element at most."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._held = ""
        self._at = 0
        self._ended = False

    def next_sign(self, number: int) -> str:
        """The first character that isn't blank; the window begins there then."""
        while True:
            self._at = self._blanks_end(self._at)
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._more(number):
                raise Unreadable(number, "the file ends inside the array")

    def skip(self, sign: str) -> None:
        if self.next_sign(1) != sign:
            raise Unreadable(1, f"isn't JSON ({sign!r} expected)")
        self._at += 1

    def element(self, decode: Any, number: int) -> tuple[Any, str | None]:
        """(value, None), or why it is none. Grows the window twofold until the element is whole."""
        while True:
            left = len(self._held) - self._at
            try:
                value, end = decode(self._held, self._at)
            except RecursionError:
                raise Unreadable(number, "isn't a row (nested too deeply)") from None
            except ValueError as error:
                if left > MOST_BYTES:
                    raise Unreadable(number, f"isn't JSON, or is longer than {MOST_BYTES >> 20} MiB") from None
                if not self._grow(left, number):
                    raise Unreadable(number, f"isn't JSON ({error})") from None
                continue
            if end == len(self._held) and self._more(number):
                continue  # a number may go on
            too_long = end - self._at > MOST_BYTES
            self._at = end
            return (None, _too_long("an element")) if too_long else (value, None)

    def rest(self) -> bool:
        """Whether anything but blanks follows the sign that the window begins with."""
        self._at += 1
        while (end := self._blanks_end(self._at)) == len(self._held):
            self._at = end
            if not self._more(0):
                return False
        return True

    def _grow(self, left: int, number: int) -> bool:
        wanted = max(2 * left, _PIECE)
        grown = False
        while len(self._held) - self._at < wanted and self._more(number):
            grown = True
        return grown

    def _blanks_end(self, at: int) -> int:
        found = _BLANK.match(self._held, at)
        return found.end() if found else at

    def _more(self, number: int) -> bool:
        if self._ended:
            return False
        data = self._file.read(_PIECE)
        self._ended = not data
        try:
            decoded = self._decode(data, final=self._ended)
        except UnicodeDecodeError:
            raise Unreadable(number, "isn't UTF-8") from None
        self._held, self._at = self._held[self._at :] + decoded, 0
        return not self._ended
