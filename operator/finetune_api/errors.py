"""Describes validation errors: one line per field with its path, what is wrong, and the value.

It returns text and does no I/O.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from finetune_api.base import Model
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
    plain = _PLAIN_MESSAGES.get(detail["type"], str(detail["msg"]).removeprefix("Value error, "))
    similar = _similar_field(str(detail["loc"][-1])) if detail["type"] == "extra_forbidden" else ""
    return f"{plain} (did you mean {similar}?)" if similar else plain


def _similar_field(name: str) -> str:
    """Returns the field of any model that is spelled most like `name`; empty if none is."""
    names = {to_camel(field) for model in _models(Model) for field in model.model_fields}
    return next(iter(difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.75)), "")


def _models(model: type[Model]) -> list[type[Model]]:
    children = model.__subclasses__()
    return [*children, *(inner for child in children for inner in _models(child))]


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
