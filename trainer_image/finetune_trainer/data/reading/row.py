"""Defines a row (one example as turns) and a problem (why a record can't be used).

The module also has the checks that all formats share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
Values = Mapping[str, Any]
_INVISIBLE = " \t\r\n\v\f\xa0\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u2060\u3000\ufeff"
Omission = tuple[str, str, int]
"""(reason, subject, number) of what a row loses, as `Finding` of the data report has them."""


@dataclass(frozen=True)
class Turn:
    """Holds one turn of a conversation.

    `in_loss` is whether an assistant's turn counts in the loss. `more` is a JSON object of further
    keys (tool_calls, ...) that a chat template may use; it is empty if there are none. `as_text`
    is what the row has if its calls were read from a text.
    """

    role: str
    content: str
    in_loss: bool = True
    more: str = ""
    as_text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Row:
    """Holds one example as turns.

    `number` is that of its record; `file_index` is the position of its file in the split.
    """

    number: int
    turns: tuple[Turn, ...]  # prompt-completion is ("user", prompt), ("assistant", completion)
    plain: bool = False  # may be rendered without a chat template
    file_index: int = 0
    tools: str = ""  # JSON of a list of functions, for the chat template
    rejected: tuple[Turn, ...] = ()  # a preference pair: the turns with the rejected answer
    unread: tuple[Omission, ...] = field(default=(), compare=False)  # what was lost when it was read
    plain_prompt: str = ""  # the prompt without a chat template; if empty, it is the user's turn

    @property
    def is_text(self) -> bool:
        """Whether the row is a document: it has no prompt, and all of it counts in the loss."""
        return self.turns[0].role == "text"


class Unlabelled(ValueError):
    """Reports that a row has no label, or none that is probable enough.

    That isn't a mistake: the row is skipped and counted.
    """


@dataclass(frozen=True)
class Problem:
    """Describes why a row can't be used.

    `file` is the name of its file, or empty if the split has only one file. `unlabelled` marks a
    row that merely has no label yet, which isn't a mistake (see `labeling_tools`).
    """

    number: int
    message: str
    file: str = ""
    unlabelled: bool = False

    def __str__(self) -> str:
        return f"{f'{self.file} ' if self.file else ''}row {self.number}: {self.message}"


def union(omissions: Iterable[Omission], others: Iterable[Omission]) -> list[Omission]:
    """Return what two versions of a row lose; of what both lose, the larger number counts."""
    numbers: dict[tuple[str, str], int] = {}
    for reason, subject, number in (*_added(omissions), *_added(others)):
        numbers[reason, subject] = max(number, numbers.get((reason, subject), 0))
    return [(reason, subject, number) for (reason, subject), number in numbers.items()]


def _added(omissions: Iterable[Omission]) -> Iterator[Omission]:
    numbers: dict[tuple[str, str], int] = {}
    for reason, subject, number in omissions:
        numbers[reason, subject] = numbers.get((reason, subject), 0) + number
    yield from ((reason, subject, number) for (reason, subject), number in numbers.items())


def text(value: Values, key: str, prefix: str = "") -> str:
    """Return the string at `key`, which can be encoded as UTF-8.

    A number, or true or false, becomes its JSON, except for a document, which can't be a number.

    Raises ValueError with a message that names `prefix` and the key.
    """
    if value.get(key) is None:
        raise ValueError(missing(value, key, prefix))
    content = value[key]
    is_number = isinstance(content, int) or (isinstance(content, float) and math.isfinite(content))
    if is_number and key != "text":
        return str(getattr(content, "text", "")) or json.dumps(content)
    if not isinstance(content, str):
        raise ValueError(f"{prefix}{key} is {short_repr(content)}, which isn't text; write it as a string")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{prefix}{key} contains half a character (a lone surrogate)") from None
    return content


def is_blank(content: str) -> bool:
    """Whether a text has only characters that nobody sees: blanks, or marks without a width."""
    return not content or (content[0] in _INVISIBLE and not content.strip(_INVISIBLE)) or content.isspace()


def missing(value: Values, key: str, prefix: str = "") -> str:
    """Return the message that a record, or a part of it, has no `key`."""
    others = ", ".join(sorted(printable(name) for name, inner in value.items() if inner is not None)[:8]) or "nothing"
    remedy = f"; write {key}, or remove the row" if prefix else f"; map one in dataset.columns.{key}" if value else ""
    return f"{prefix}{key} is {'null' if key in value else 'missing'} (it has {others}){remedy}"


def printable(name: Any) -> str:
    """Return the name of a key for a message; half a character can't be written, and is escaped."""
    text = str(name)
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def short_repr(value: Any) -> str:
    """Return the repr of a value for a message, cut to 60 characters."""
    full = repr(value)
    return full if len(full) <= 60 else f"{full[:57]}…"
