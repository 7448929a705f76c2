"""Names the encoding of a text that isn't UTF-8, and says how to convert it. The module is pure."""

from __future__ import annotations

import codecs
import re
from collections import Counter

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_PAIR = re.compile(rb"[\x80-\xff][\x40-\xff]")
_EAST_ASIAN = (
    ("SHIFT_JIS", range(0x81, 0x98), 0.7),
    ("EUC-JP", range(0xA4, 0xA6), 0.3),  # kana, which Japanese can't do without
    ("EUC-KR", range(0xB0, 0xC9), 0.9),
    ("BIG5", (*range(0xA1, 0xA4), *range(0xA4, 0xC7)), 0.9),
    ("GB18030", range(0xA1, 0xD8), 0.7),
)
"""(encoding, the first bytes of its common characters, the least share of them in a text)"""


def of_head(head: bytes) -> str:
    """Return UTF-16 or UTF-32 if a file begins as one of them, with or without a mark; else an
    empty string."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    text = head[: len(head) // 4 * 4]
    zeros = [text[offset::4].count(0) for offset in range(4)]
    quarter = len(text) // 4
    if quarter and sum(count > quarter // 2 for count in zeros) == 3:
        return "UTF-32"
    for offset, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if quarter and zeros[offset] + zeros[offset + 2] > quarter and zeros[1 - offset] + zeros[3 - offset] == 0:
            return name
    return ""


def remedy(encoding: str) -> str:
    """Return the message about a file in another encoding."""
    return f"is {encoding}; save it as UTF-8, for example with `iconv -f {encoding} -t UTF-8`"


def not_utf8(data: bytes, position: int, before: int = 0) -> str:
    """Return the message about bytes that can't be decoded, with the encoding they look like.

    `before` is the number of bytes that come before `data`.
    """
    guess = _guess(data)
    remedy = (
        f"it looks like {guess}: save it as UTF-8, for example with `iconv -f {guess} -t UTF-8`, and see whether it "
        "reads well"
        if guess
        else "save it as UTF-8 with the program that wrote it"
    )
    return f"isn't UTF-8 (byte {before + position}); {remedy}"


def _guess(data: bytes) -> str:
    """Return the encoding that bytes look like; empty if they look like none.

    Letters with accents stand alone between ASCII letters, and characters of East Asia have two
    bytes, of which the first is that of a common character. Other alphabets look like each other.
    """
    high = sum(byte >= 0x80 for byte in data)
    alone = sum(len(run.group()) == 1 for run in re.finditer(rb"[\x80-\xff]+", data))
    if not high or b"\x00" in data:
        return ""
    if alone * 2 >= high and not any(byte in data for byte in b"\x81\x8d\x8f\x90\x9d"):
        return "WINDOWS-1252"
    pairs = _PAIR.findall(data)
    first = Counter(pair[0] for pair in pairs)
    for encoding, common, share in _EAST_ASIAN:
        if sum(first[byte] for byte in common) >= share * len(pairs) and _decodes(data, encoding):
            return encoding
    return ""


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
