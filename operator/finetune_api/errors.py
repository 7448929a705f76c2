"""Describes validation errors: one line per field with its path, what is wrong, and the value.

It returns text and does no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from finetune_api.scalars import PATTERN_MESSAGES

MAX_SHOWN_CHARACTERS = 80
_PLAIN_MESSAGES = {"missing": "is required", "extra_forbidden": "is not a field of this version; check the spelling"}


def describe(error: ValidationError) -> tuple[str, ...]:
    """Returns one sentence per invalid field.

    An example is `spec.method.lora.rank: Input should be … (got 0)`.
    """
    return tuple(
        f"{path(detail['loc'])}: {_problem(detail)}{_got(detail['type'], detail['input'])}"
        for detail in error.errors(include_url=False)
    )


def unknown_locations(error: ValidationError) -> tuple[tuple[int | str, ...], ...]:
    """Returns where a document has fields that this version doesn't have."""
    return tuple(detail["loc"] for detail in error.errors(include_url=False) if detail["type"] == "extra_forbidden")


def _problem(detail: Mapping[str, Any]) -> str:
    """Returns what is wrong with a value, in plain words where pydantic's own are technical."""
    if detail["type"] == "string_pattern_mismatch":
        return PATTERN_MESSAGES.get(detail["ctx"]["pattern"], str(detail["msg"]))
    return _PLAIN_MESSAGES.get(detail["type"], str(detail["msg"]).removeprefix("Value error, "))


def path(loc: tuple[int | str, ...]) -> str:
    """Formats `("spec", "pod", "tolerations", 0, "key")` as `spec.pod.tolerations[0].key`."""
    text = ""
    for part in loc:
        if part == "[key]":
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _got(kind: str, value: object) -> str:
    """Returns the rejected value in parentheses; empty if it wouldn't help."""
    if kind in ("missing", "extra_forbidden", "rule"):
        return ""
    text = repr(value)
    return f" (got {text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + '…'})"
