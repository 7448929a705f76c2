"""Reads a JSON array as numbered records, and holds one element at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from finetune_trainer.data.reading.compression import Readable
from finetune_trainer.data.reading.record import MAX_RECORD_BYTES, Record, Unreadable, too_long

READ_BYTES = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")


def json_array(file: Readable) -> Iterator[Record]:
    """Yield the elements of one array, numbered by position from 1. Raises Unreadable."""
    decode = json.JSONDecoder().raw_decode
    window = _Window(file)
    window.skip("[")
    number = 0
    while True:
        number += 1
        following = window.next_character(number)
        if following == "]":
            if window.has_more_text():
                raise Unreadable(number, "there is something after the end of the array")
            return
        if number > 1:
            if following != ",":
                raise Unreadable(number, f"isn't JSON (a comma is missing before {following!r})")
            window.skip(",")
            window.next_character(number)
        value, problem = window.element(decode, number)
        if problem or not isinstance(value, dict):
            yield number, problem or "isn't a JSON object"
        else:
            yield number, value


class _Window:
    """A window that moves over a stream of UTF-8 text and holds at most one element."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._position = 0
        self._ended = False

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
            except ValueError as error:
                if characters > MAX_RECORD_BYTES:
                    raise Unreadable(number, f"isn't JSON, or is longer than {MAX_RECORD_BYTES >> 20} MiB") from None
                if not self._grow(characters, number):
                    raise Unreadable(number, f"isn't JSON ({error})") from None
                continue
            if end == len(self._text) and self._read_more(number):
                continue  # the digits of a number may continue
            is_too_long = end - self._position > MAX_RECORD_BYTES
            self._position = end
            return (None, too_long("an element")) if is_too_long else (value, None)

    def has_more_text(self) -> bool:
        """Whether anything except blanks follows the character that the window begins with."""
        self._position += 1
        while (end := self._end_of_blanks(self._position)) == len(self._text):
            self._position = end
            if not self._read_more(0):
                return False
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
        except UnicodeDecodeError:
            raise Unreadable(number, "isn't UTF-8") from None
        self._text, self._position = self._text[self._position :] + decoded, 0
        return not self._ended
