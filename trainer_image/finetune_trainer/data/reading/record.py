"""Defines a record: a numbered JSON object of a file, or the reason why it can't be used."""

from __future__ import annotations

from typing import Any

MAX_RECORD_BYTES = 16 << 20
"""A longer record isn't read; it is reported by its number."""

Record = tuple[int, dict[str, Any] | str]
"""The number of the record, and its object or the reason why it has none."""


class Unreadable(Exception):
    """Reports that a file can't be read from record `number` on; 0 stands for the entire file."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.message = message


def too_long(subject: str) -> str:
    """Return the message about a record, or a part of one, that is longer than MAX_RECORD_BYTES."""
    return f"{subject} has more than {MAX_RECORD_BYTES >> 20} MiB; a row is one example: split it"
