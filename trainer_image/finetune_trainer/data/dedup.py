"""Finds rows that are equal or nearly equal, by their digests.

Rows are nearly equal if they differ only in case, spaces, punctuation or numbers. A digest of what
remains without those finds them in one pass and needs 16 bytes per row. The module is pure.
"""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.reading.row import Row

_MIN_LETTERS = 20  # a row with fewer letters is about its numbers, so those count


def near_duplicate_digest(row: Row) -> bytes:
    """Return 16 bytes that nearly equal rows have in common.

    Symbols (+, <, currency signs) count.
    """
    turns = (*row.turns, *row.rejected)
    normalized = [_normalized(turn.content) for turn in turns]
    without_system = [text for text, turn in zip(normalized, turns, strict=True) if turn.role != "system"]
    numberless = [_without_numbers(text) for text in without_system]
    letters = sum(len(text) - text.count("0") - text.count(" ") for text in numberless)
    texts = [_without_numbers(text) for text in normalized] if letters >= _MIN_LETTERS else normalized
    roles = (turn.role for turn in turns)
    content = "\0".join((*roles, *texts, row.tools, *(turn.more for turn in row.turns)))
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def first_occurrence(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return for each row the index of the first row with the same digest, which may be its own.

    `digests` has the shape (rows, 16).
    """
    keys = sortable(digests)
    order = np.argsort(keys, kind="stable")
    first = np.empty(len(keys), np.int64)
    if len(keys):
        ordered = keys[order]
        starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first


def first_match(digests: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return for each row the index of the first of `others` with the same digest, or -1."""
    other_keys = sortable(others)
    order = np.argsort(other_keys, kind="stable")
    ordered, keys = other_keys[order], sortable(digests)
    candidates = np.searchsorted(ordered, keys)
    matches = candidates < len(ordered)
    matches[matches] = ordered[candidates[matches]] == keys[matches]
    first = np.full(len(keys), -1, np.int64)
    first[matches] = order[candidates[matches]]
    return first


def sortable(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """View digests of 16 bytes per row as one sortable value per row."""
    return np.ascontiguousarray(digests).view("S16").ravel()


class _CharacterMap(dict[int, str]):
    """A str.translate table that turns punctuation, spaces and controls into spaces."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = mapped = " " if unicodedata.category(character)[0] in "PZC" else character
        return mapped


_CHARACTERS = _CharacterMap()
_DIGITS = {ord(digit): "0" for digit in "123456789"}


def _normalized(text: str) -> str:
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(plain.casefold().translate(_CHARACTERS).split())


def _without_numbers(text: str) -> str:
    """Replace every number by 0."""
    zeros = text.translate(_DIGITS)
    while "00" in zeros:
        zeros = zeros.replace("00", "0")
    return zeros
