"""Which rows say the same, or nearly the same. Pure; called by `examples` row by row and by `survey` on whole splits.

Rows are nearly the same where they differ only in case, spaces, punctuation or numbers: a digest of what is left finds
them in one pass, with 16 bytes a row.
"""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.shapes import Row

_LETTERS = 20  # a row with fewer is about its numbers


def folded(row: Row) -> bytes:
    """16 bytes that rows which are nearly the same have in common. Symbols (+, <, currencies) stay."""
    said = [_words(turn.content) for turn in (*row.turns, *row.rejected)]
    asked = [words for words, turn in zip(said, (*row.turns, *row.rejected), strict=True) if turn.role != "system"]
    without = [_numberless(words) for words in asked]
    letters = sum(len(words) - words.count("0") - words.count(" ") for words in without)
    kept = [_numberless(words) for words in said] if letters >= _LETTERS else said
    roles = (turn.role for turn in (*row.turns, *row.rejected))
    whole = "\0".join((*roles, *kept, row.tools, *(turn.more for turn in row.turns)))
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()


def first(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of each row the place of the first one with the same 16 bytes: its own, unless it came before."""
    keys = sortable(digests)
    order = np.argsort(keys, kind="stable")
    found = np.empty(len(keys), np.int64)
    if len(keys):
        ordered = keys[order]
        starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        found[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return found


def among(digests: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of each row the place of the first one of `others` with the same 16 bytes, or -1."""
    theirs = sortable(others)
    order = np.argsort(theirs, kind="stable")
    ordered, keys = theirs[order], sortable(digests)
    at = np.searchsorted(ordered, keys)
    there = at < len(ordered)
    there[there] = ordered[at[there]] == keys[there]
    found = np.full(len(keys), -1, np.int64)
    found[there] = order[at[there]]
    return found


def sortable(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """16 bytes a row as one value each."""
    return np.ascontiguousarray(digests).view("S16").ravel()


class _Signs(dict[int, str]):
    """What str.translate makes of a sign: punctuation, spaces and what isn't shown are spaces."""

    def __missing__(self, sign: int) -> str:
        text = chr(sign)
        self[sign] = found = " " if unicodedata.category(text)[0] in "PZC" else text
        return found


_SIGNS = _Signs()
_DIGITS = {ord(digit): "0" for digit in "123456789"}


def _words(text: str) -> str:
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(plain.casefold().translate(_SIGNS).split())


def _numberless(words: str) -> str:
    """Every number is a 0."""
    found = words.translate(_DIGITS)
    while "00" in found:
        found = found.replace("00", "0")
    return found
