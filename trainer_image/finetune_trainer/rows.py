"""Reads a JSON-lines file into typed rows, and says by number which rows can't be used. No torch, no tokenizer.

Called by `examples` (preflight and rank 0 of a node). Never decides what happens to a bad row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Format = Literal["prompt-completion", "messages"]
ROLES = ("system", "user", "assistant", "tool")
SHOWN = 10


@dataclass(frozen=True)
class Turn:
    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One example. `number` counts lines of the file from 1, blank ones too, as an editor does."""

    number: int
    turns: tuple[Turn, ...]  # prompt-completion is ("user", prompt), ("assistant", completion)
    plain: bool = False  # prompt-completion: may be rendered without a chat template


@dataclass(frozen=True)
class Problem:
    """Why a row can't be used."""

    number: int
    message: str


@dataclass(frozen=True)
class Rows:
    """What a file holds. `format` is None for a file without a readable row."""

    format: Format | None
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    duplicates: int


def read(path: Path, format: str = "auto") -> Rows:
    """All rows of a file and all problems; never raises for what a row holds."""
    with path.open("rb") as lines:
        return parse(lines, format)


def parse(lines: Iterable[bytes], format: str = "auto") -> Rows:
    """`format` is auto, prompt-completion or messages; auto looks at the first readable row's keys."""
    found: Format | None = None if format == "auto" else _format(format)
    rows: list[Row] = []
    problems: list[Problem] = []
    seen: set[bytes] = set()
    duplicates = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = _object(line)
            if found is None:
                found = _detect(value)
            row = _messages(number, value) if found == "messages" else _prompt_completion(number, value)
        except ValueError as error:
            problems.append(Problem(number, str(error)))
            continue
        digest = hashlib.blake2b(repr(row.turns).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        duplicates += digest in seen
        seen.add(digest)
        rows.append(row)
    return Rows(found, tuple(rows), tuple(problems), duplicates)


def listing(problems: Iterable[Problem]) -> str:
    """`row 3: …; row 9: …` with the first ten, and how many more there are."""
    ordered = sorted(problems, key=lambda problem: problem.number)
    shown = "; ".join(f"row {problem.number}: {problem.message}" for problem in ordered[:SHOWN])
    more = len(ordered) - SHOWN
    return f"{shown}; and {more} more" if more > 0 else shown


def _format(name: str) -> Format:
    if name == "messages":
        return "messages"
    if name == "prompt-completion":
        return "prompt-completion"
    raise ValueError(f"dataset.format {name!r} isn't one of auto, prompt-completion, messages")


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"isn't UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"isn't JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("isn't a row (nested too deeply)") from None
    if not isinstance(value, dict):
        raise ValueError("isn't a JSON object")
    return value


def _detect(value: dict[str, Any]) -> Format:
    if "messages" in value:
        return "messages"
    if "prompt" in value or "completion" in value:
        return "prompt-completion"
    keys = ", ".join(sorted(value)[:5]) or "none"
    raise ValueError(f"has neither prompt and completion nor messages (its keys: {keys})")


def _prompt_completion(number: int, value: dict[str, Any]) -> Row:
    prompt = _text(value, "prompt")
    completion = _text(value, "completion")
    if not completion.strip():
        raise ValueError("completion is empty")
    return Row(number, (Turn("user", prompt), Turn("assistant", completion)), plain=True)


def _messages(number: int, value: dict[str, Any]) -> Row:
    if "messages" not in value:
        raise ValueError("messages is missing")
    listed = value["messages"]
    if not isinstance(listed, list) or not listed:
        raise ValueError("messages isn't a list with at least one turn")
    turns = tuple(_turn(index, turn) for index, turn in enumerate(listed))
    if turns[-1].role != "assistant":
        raise ValueError(f"the last turn's role is {turns[-1].role!r}; it must be 'assistant', which is learnt")
    if turns[0].role == "assistant":
        raise ValueError("the first turn's role is 'assistant'; there is nothing to answer")
    if not turns[-1].content.strip():
        raise ValueError("the last turn's content is empty")
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("role 'system' must be the first turn")
    return Row(number, turns)


def _turn(index: int, turn: Any) -> Turn:
    where = f"messages[{index}]"
    if not isinstance(turn, dict):
        raise ValueError(f"{where} isn't an object with role and content")
    role = turn.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}")
    return Turn(role, _text(turn, "content", where=f"{where}."))


def _text(value: dict[str, Any], key: str, where: str = "") -> str:
    if key not in value:
        raise ValueError(f"{where}{key} is missing")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"{where}{key} isn't a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}{key} holds half a character (a lone surrogate)") from None
    return text
