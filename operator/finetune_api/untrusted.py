"""Bounds whatever comes from a pod, a store, or an object that somebody else may have written.

Status, progress posts, termination messages and labels are declared with these types and nothing
else, so that a value which passes the door fits the API server, a metric and a terminal. It does no
I/O.
"""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

MAX_INTEGER = 2**63 - 1  # int64, which the CRD's integers are
MAX_FIGURE = 1e300  # far from where adding or rounding would overflow
MAX_LINE_CHARACTERS = 2048
MAX_TEXT_CHARACTERS = 8192

_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}")
# Control, bidirectional and other invisible characters, the line and paragraph separators, tags,
# lone surrogates, and code points that are no characters. A terminal, a table or YAML would act on
# them. The joiners U+200C and U+200D stay, because scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
    "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    + "".join(chr(plane << 16 | end) for plane in range(1, 17) for end in (0xFFFE, 0xFFFF))
    + "]"
)
_REPLACEMENT = "\ufffd"
# What a URL may hold besides a place: a user with a password, and a query with a signature.
_URL_USER = re.compile(r"://[^\s/?#@\"'<>]{1,512}@")
_URL_QUERY = re.compile(r"(://[^\s?#\"'<>]{1,1024})\?[^\s\"'<>)]+")


def line(text: str, limit: int = MAX_LINE_CHARACTERS) -> str:
    """Returns a text as one line of at most `limit` printable characters."""
    return _cut(_UNSAFE.sub(_REPLACEMENT, re.sub(r"[\r\n\t]+", " ", text[: 4 * limit])), limit)


def without_url_secrets(text: str) -> str:
    """Returns a text whose URLs have no user, password and query, which may be credentials."""
    return _URL_QUERY.sub(r"\1?…", _URL_USER.sub("://…@", text)) if "://" in text else text


def shortened(text: str, limit: int) -> str:
    """Returns a line of at most `limit` characters, with … where something is missing.

    That is behind a first sentence that fills at least half of the line, as the scheduler writes
    it, else behind the middle: errors often name their cause at the end.
    """
    if len(text) <= limit:
        return text
    sentence = text.find(". ", limit // 2, limit - 1)
    if sentence > 0:
        return f"{text[: sentence + 1]} …"
    end = limit // 3
    return f"{text[: limit - 1 - end].rstrip()}…{text[-end:].lstrip()}"


def lines(text: str, limit: int = MAX_TEXT_CHARACTERS) -> str:
    """Returns the end of a text: at most `limit` characters, printable except for line breaks and
    tabs."""
    parts = re.split(r"([\n\t])", text[-limit:].replace("\r\n", "\n"))
    return "".join(part if part in ("\n", "\t") else _UNSAFE.sub(_REPLACEMENT, part) for part in parts)


def is_time(text: str) -> bool:
    """Whether a text is a time as RFC 3339 has it, with its zone."""
    return _instant(text) is not None


def seconds(text: str) -> float | None:
    """Returns a time as seconds since 1970; None if it isn't a time."""
    moment = _instant(text)
    return moment.timestamp() if moment else None


def integer(value: Any, default: int = 0, low: int = 0, high: int = MAX_INTEGER) -> int:
    """Returns a number of a foreign object: a text of digits or an integer; else the default."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value):
        value = int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and low <= value <= high else default


def string(value: Any, limit: int = MAX_LINE_CHARACTERS) -> str:
    """Returns a text of a foreign object as one line; empty if it isn't a text."""
    return line(value, limit) if isinstance(value, str) else ""


def time(value: Any) -> str:
    """Returns a time of a foreign object; empty if it isn't one."""
    return value if isinstance(value, str) and is_time(value) else ""


def _instant(text: str) -> datetime | None:
    if len(text) > 40 or not _TIME.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text.upper())
        moment.timestamp()
    except (ValueError, OverflowError):
        return None
    return moment if 1970 <= moment.year <= 9000 else None


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _line_of(limit: int) -> Any:
    return AfterValidator(lambda text: line(text, limit))


def _time(text: str) -> str:
    if not is_time(text):
        raise ValueError("must be a time as in RFC 3339, such as 2026-01-31T12:00:00Z")
    return text


def _range(low: float, high: float) -> Any:
    def check(value: Any) -> Any:
        if not (low <= value <= high):
            raise ValueError(f"must be from {low} to {high}")
        return value

    return AfterValidator(check)


def _figure(value: float) -> float:
    if not math.isfinite(value) or abs(value) > MAX_FIGURE:
        raise ValueError(f"must be a number from -{MAX_FIGURE:g} to {MAX_FIGURE:g}")
    return value


def _ratio(value: float) -> float:
    if not (-1e-6 <= value <= 1 + 1e-6):
        raise ValueError("must be from 0 to 1")
    return min(max(value, 0.0), 1.0)


def _camel_case(text: str) -> str:
    return text if not text or _NAME.fullmatch(text) else "Unknown"


def at_most(count: int) -> Any:
    """Returns a validator that leaves out what a list has beyond `count` entries."""
    return BeforeValidator(lambda items: items[:count] if isinstance(items, list | tuple) else items)


Line = Annotated[str, _line_of(MAX_LINE_CHARACTERS)]
ShortLine = Annotated[str, _line_of(128)]
Lines = Annotated[str, AfterValidator(lines)]
ReasonName = Annotated[str, AfterValidator(_camel_case)]
Time = Annotated[str, AfterValidator(_time)]
Count = Annotated[int, _range(0, MAX_INTEGER)]
Rank = Annotated[int, _range(0, 1 << 20)]
ExitCode = Annotated[int, _range(-255, 1 << 31)]
Figure = Annotated[float, AfterValidator(_figure)]
Ratio = Annotated[float, AfterValidator(_ratio)]
