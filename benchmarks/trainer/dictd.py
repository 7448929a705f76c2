"""Reads a dictionary in dictd's format (an index with base-64 numbers beside one long text). Pure; used by `texts`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def number(text: str) -> int:
    """
    >>> number("CBcG")
    530182
    """
    value = 0
    for digit in text:
        value = value * 64 + _DIGITS[digit]
    return value


def entries(index: Iterable[str], text: bytes) -> Iterator[str]:
    """Every entry once, in the index's order, as one line of running text that starts with its headword."""
    seen: set[tuple[str, str]] = set()
    for line in index:
        head, offset, size = line.rstrip("\n").split("\t")
        if head.startswith("00-") or (offset, size) in seen:
            continue
        seen.add((offset, size))
        begin = number(offset)
        yield " ".join(text[begin : begin + number(size)].decode().split())
