"""Reads JSON that isn't one object per line as numbered records, and holds one object at a time.

It is an array, objects one after the other over any number of lines, or one object that holds all
rows: a list of them, or columns.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from finetune_trainer.data.reading.compression import Readable
from finetune_trainer.data.reading.containers import encodings, json_text
from finetune_trainer.data.reading.record import MAX_RECORD_BYTES, Record, Unreadable, too_long

READ_BYTES = 1 << 20
_WRAPPERS = frozenset(("data", "rows", "train", "examples", "items", "records", "instances"))
_HELD_OUT = frozenset(("test", "validation", "valid", "val", "dev", "eval"))
_BLANKS = re.compile(r"[ \t\r\n]*")


def json_values(file: Readable) -> Iterator[Record]:
    """Yield the rows of a file, numbered by position from 1. Raises Unreadable."""
    window = _Window(file)
    if window.next_character(1) == "[":
        yield from _array(window)
        return
    decode = json_text.DECODER.raw_decode
    first = window.element(decode, 1)
    if not window.has_more_text():
        yield from _rows_of(first)
        return
    value: tuple[Any, str | None] | None = first
    number = 0
    while value is not None:
        number += 1
        yield number, _record(*value)
        value = window.element(decode, number + 1) if window.has_more_text() else None


def _record(value: Any, problem: str | None) -> dict[str, Any] | str:
    if problem or not isinstance(value, dict):
        return problem or json_text.no_object(value)
    return value


def _rows_of(element: tuple[Any, str | None]) -> Iterator[Record]:
    """Yield the rows that a file's only object holds, or the object as the only row."""
    rows = None if element[1] else _unwrapped(element[0])
    yield from enumerate(rows, start=1) if rows is not None else ((1, _record(*element)),)


def _unwrapped(value: Any) -> list[dict[str, Any]] | None:
    """Return the rows of an object that isn't a row: a list of rows under a key, or columns as
    pandas writes them. Returns None for any other object."""
    if not isinstance(value, dict) or not value:
        return None
    lists = [inner for key, inner in value.items() if key in _WRAPPERS and isinstance(inner, list)]
    splits = [key for key, inner in value.items() if key in (*_WRAPPERS, *_HELD_OUT) and _is_list_of_rows(inner)]
    if len(lists) == 1 and len(splits) > 1:
        several = ", ".join(splits)
        raise Unreadable(0, f"has several lists of rows ({several}); write each of them into a file of its own")
    names: Any = value.get("columns")
    if isinstance(names, list) and lists and all(isinstance(row, list) and len(row) == len(names) for row in lists[0]):
        return [dict(zip(names, row, strict=True)) for row in lists[0]]
    if len(lists) == 1 and _is_list_of_rows(lists[0]):
        viewed = [row.get("row") for row in lists[0]]  # the dataset viewer of the Hub writes {"row_idx": …, "row": …}
        is_view = all(isinstance(row, dict) for row in viewed) and all("row_idx" in row for row in lists[0])
        return viewed if is_view else list(lists[0])
    columns = list(value.values())
    if _are_columns(columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if all(isinstance(row, dict) for row in columns) and all(key.isdecimal() for key in value):
        return columns  # rows by their index
    if all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        return [{name: column[key] for name, column in value.items()} for key in columns[0]]
    return None


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _are_columns(values: list[Any]) -> bool:
    """Whether the values of an object are lists with an entry for each row, of which one has texts.
    A list of turns has none."""
    are_lists = all(isinstance(column, list) and len(column) == len(values[0]) > 0 for column in values)
    if not are_lists or any(isinstance(entry, dict) for column in values for entry in column):
        return False
    return any(all(isinstance(entry, str) for entry in column) for column in values)


def _array(window: _Window) -> Iterator[Record]:
    decode = json_text.DECODER.raw_decode
    window.skip("[")
    number = 0
    while True:
        number += 1
        following = window.next_character(number)
        if following == "]":
            window.skip("]")
            if window.has_more_text():
                raise Unreadable(number, "there is something after the end of the array")
            return
        if number > 1:
            if following != ",":
                raise Unreadable(number, f"isn't JSON (a comma is missing before {following!r})")
            window.skip(",")
            window.next_character(number)
        value, problem = window.element(decode, number)
        yield number, _record(value, problem)


class _Window:
    """A window that moves over a stream of UTF-8 text and holds at most one element."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._position = 0
        self._ended = False
        self._bytes = 0

    def next_character(self, number: int) -> str:
        """Move the window to the first character that isn't blank, and return it."""
        while True:
            self._position = self._end_of_blanks(self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more(number):
                raise Unreadable(number, "the file ends inside the array")

    def skip(self, character: str) -> None:
        """Move the window past `character`. Raises Unreadable if another one comes next."""
        if self.next_character(1) != character:
            raise Unreadable(1, f"isn't JSON ({character!r} expected)")
        self._position += 1

    def element(self, decode: Any, number: int) -> tuple[Any, str | None]:
        """Return (value, None), or (None, message) for an element that is too long.

        The window doubles until it holds the complete element.
        """
        while True:
            characters = len(self._text) - self._position
            try:
                value, end = decode(self._text, self._position)
            except RecursionError:
                raise Unreadable(number, "isn't a row (nested too deeply)") from None
            except json_text.RepeatedKey as error:
                raise Unreadable(number, json_text.refusal(error)) from None
            except ValueError as error:
                if characters > MAX_RECORD_BYTES:
                    raise Unreadable(number, f"isn't JSON, or is longer than {MAX_RECORD_BYTES >> 20} MiB") from None
                if not self._grow(characters, number):
                    hint = json_text.hint(error) if isinstance(error, json.JSONDecodeError) else ""
                    message = f"isn't JSON ({error}){hint}" if hint or isinstance(error, json.JSONDecodeError) else ""
                    raise Unreadable(number, message or json_text.refusal(error)) from None
                continue
            if end == len(self._text) and self._read_more(number):
                continue  # the digits of a number may continue
            is_too_long = end - self._position > MAX_RECORD_BYTES
            value = value if is_too_long else json_text.exact(value, self._text[self._position : end])
            self._position = end
            return (None, too_long("an element")) if is_too_long else (value, None)

    def has_more_text(self) -> bool:
        """Whether anything except blanks follows, to which the window moves."""
        while (end := self._end_of_blanks(self._position)) == len(self._text):
            self._position = end
            if not self._read_more(0):
                return False
        self._position = end
        return True

    def _grow(self, characters: int, number: int) -> bool:
        size = max(2 * characters, READ_BYTES)
        grown = False
        while len(self._text) - self._position < size and self._read_more(number):
            grown = True
        return grown

    def _end_of_blanks(self, position: int) -> int:
        blanks = _BLANKS.match(self._text, position)
        return blanks.end() if blanks else position

    def _read_more(self, number: int) -> bool:
        if self._ended:
            return False
        data = self._file.read(READ_BYTES)
        self._ended = not data
        try:
            decoded = self._decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise Unreadable(number, encodings.not_utf8(data, error.start, self._bytes)) from None
        self._bytes += len(data)
        self._text, self._position = self._text[self._position :] + decoded, 0
        return not self._ended
