"""Reads preference pairs: a record with a chosen and a rejected answer becomes one row.

The row becomes one example with one prompt, which ends where the first answer begins that differs
between the two sides. The module doesn't import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from finetune_trainer.data.reading.row import Row

FORMAT = "preference"
_KEYS = ("prompt", "chosen", "rejected")


def is_pair(value: Mapping[str, Any]) -> bool:
    """Whether a record has both a chosen and a rejected answer."""
    return "chosen" in value and "rejected" in value


def row(number: int, value: Mapping[str, Any], texts: Callable[..., Row], messages: Callable[..., Row]) -> Row:
    """Read a record whose answers are strings with a prompt, or lists of turns with or without one.

    `texts` and `messages` read a record that has a single answer. Raises ValueError.
    """
    sides = {key: _side(number, value, key, texts, messages) for key in ("chosen", "rejected")}
    return replace(sides["chosen"], rejected=sides["rejected"].turns)


def _side(
    number: int, value: Mapping[str, Any], key: str, texts: Callable[..., Row], messages: Callable[..., Row]
) -> Row:
    if key not in value:
        raise ValueError(f"{key} is missing")
    rest = {name: content for name, content in value.items() if name not in _KEYS}
    answer, prompt = value[key], value.get("prompt")
    try:
        if isinstance(answer, list):
            before = prompt if isinstance(prompt, list) else []
            if isinstance(prompt, str):
                before = [{"role": "user", "content": prompt}]
            return messages(number, {**rest, "messages": [*before, *answer]})
        return texts(number, {**rest, **({"prompt": prompt} if "prompt" in value else {}), "completion": answer})
    except ValueError as error:
        message = str(error).replace("completion", key)
        raise ValueError(message if message.startswith((key, "prompt")) else f"{key}: {message}") from None


def sides(pair: Row) -> tuple[Row, ...]:
    """Return a pair as two rows, chosen and rejected, and any other row as itself."""
    if not pair.rejected:
        return (pair,)
    return tuple(replace(pair, turns=turns, rejected=()) for turns in (pair.turns, pair.rejected))
