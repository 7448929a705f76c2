"""Reads a dictionary in dictd's format: a text, and an index with numbers in base 64. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def number(text: str) -> int:
    """Decodes a number of the index.

    >>> number("CBcG")
    530182
    """
    value = 0
    for digit in text:
        value = value * 64 + _DIGITS[digit]
    return value


def entries(index: Iterable[str], text: bytes) -> Iterator[str]:
    """Yields every entry once, in the index's order, as one line that starts with its headword."""
    yielded: set[tuple[str, str]] = set()
    for line in index:
        head, offset, size = line.rstrip("\n").split("\t")
        if head.startswith("00-") or (offset, size) in yielded:
            continue
        yielded.add((offset, size))
        begin = number(offset)
        yield " ".join(text[begin : begin + number(size)].decode().split())
