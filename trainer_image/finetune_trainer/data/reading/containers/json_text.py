"""Decodes JSON, refuses keys that an object has twice, and says what a text that isn't JSON may be.

The module is pure.
"""

from __future__ import annotations

import json
import re
from typing import Any

from finetune_trainer.data.reading.row import short_repr

_PYTHON_VALUES = re.compile(r"(None|True|False|nan|inf)\b")
_BEFORE_VALUES = frozenset(": \t\r\n[,")
_AFTER_VALUES = frozenset(",}] \t\r\n")
_SINGLE_QUOTED = re.compile(r"[\[{]\s*'")


class RepeatedKey(ValueError):
    """Reports an object that has the same key twice, one of which would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise RepeatedKey(f"has the key {repeated!r} twice in one object; remove one")
    return value


class WrittenNumber(float):
    """A number with a fraction or an exponent. `text` is how it was written, which a float may be
    too short to hold."""

    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        """Return the number that `text` is."""
        number = super().__new__(cls, text)
        number.text = text
        return number


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""A decoder that raises RepeatedKey."""
_EXACT = json.JSONDecoder(object_pairs_hook=_object, parse_float=WrittenNumber)


def decode(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, of which JSONDecodeError and RepeatedKey
    are kinds, and RecursionError."""
    return DECODER.decode(text)


def exact(value: Any, text: str) -> Any:
    """Return the value of a JSON text, whose numbers beside its other keys may be answers, with
    these numbers as they were written. `value` is what `decode` returned for the text."""
    if not isinstance(value, dict):
        return value
    for inner in value.values():
        if type(inner) is float and not _has_number(text, repr(inner)):
            return _EXACT.decode(text)
    return value


def _has_number(text: str, written: str) -> bool:
    """Whether a text contains a number in just these digits."""
    begin = text.find(written)
    end = begin + len(written)
    return begin > 0 and text[begin - 1] in _BEFORE_VALUES and text[end : end + 1] in _AFTER_VALUES


def repeated_key(text: str) -> str:
    """Return the message about a key that a JSON text has twice in an object; empty if there is
    none."""
    try:
        decode(text)
    except RepeatedKey as error:
        return str(error)
    except (ValueError, RecursionError):
        return ""
    return ""


def refusal(error: ValueError) -> str:
    """Return the message about a text that is JSON and can't be used."""
    if isinstance(error, RepeatedKey):
        return str(error)
    if "integer string conversion" in str(error):
        return "has a number of more than 4,300 digits; write it as a string"
    return f"isn't a row ({error})"


def hint(error: json.JSONDecodeError) -> str:
    """Return what a text that isn't JSON seems to be, with the remedy, or an empty string."""
    text, rest = error.doc, error.doc[error.pos :]
    if _SINGLE_QUOTED.match(text.lstrip()) or _SINGLE_QUOTED.match(text[max(0, error.pos - 1) :]):
        return "; it looks like Python's own notation: write it with json.dumps"
    if value := _PYTHON_VALUES.match(rest):
        return f"; it has Python's {value.group()}: write it with json.dumps"
    before = text[: error.pos].rstrip()
    if rest[:1] in ("}", "]") or (before.endswith(",") and error.msg.startswith("Illegal trailing comma")):
        return "; a comma before a bracket has to go"
    if error.msg == "Extra data" and rest.strip() == ",":
        return "; the comma at the end of the line has to go"
    if text.lstrip().startswith(("//", "#")):
        return "; JSON has no comments: remove the line"
    return ""


def no_object(value: Any) -> str:
    """Return the message about a JSON value that isn't an object."""
    turns = isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value)
    remedy = 'write {"messages": [...]}' if turns else "write an object with keys such as prompt and completion"
    return f"is {short_repr(value)}, which isn't a JSON object; {remedy}"


def decoded(value: Any, path: str, expected: str = "a list of calls") -> Any:
    """Return the value of a JSON text, or a value that isn't a text as it is. Raises ValueError
    that names `path` and what is expected there."""
    if not isinstance(value, str):
        return value
    try:
        return decode(value)
    except RepeatedKey as error:
        raise ValueError(f"{path} {error}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is {short_repr(value)}, which isn't JSON; write {expected}") from None
