"""A refusal in words: one line a field, with the path as Kubernetes writes it, what is wrong, and the value.

Used by the operator's conditions and the command line. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from finetune_api.scalars import MEANING

SHOWN_CHARACTERS = 80
_PLAIN = {"missing": "is required", "extra_forbidden": "is no field that this version knows; look for a misspelling"}


def describe(error: ValidationError) -> tuple[str, ...]:
    """One sentence for each wrong field, e.g. `spec.method.lora.rank: Input should be … (got 0)`."""
    return tuple(
        f"{path(detail['loc'])}: {_meaning(detail)}{_shown(detail['type'], detail['input'])}"
        for detail in error.errors(include_url=False)
    )


def _meaning(detail: Mapping[str, Any]) -> str:
    if detail["type"] == "string_pattern_mismatch":
        return MEANING.get(detail["ctx"]["pattern"], str(detail["msg"]))
    return _PLAIN.get(detail["type"], str(detail["msg"]).removeprefix("Value error, "))


def path(loc: tuple[int | str, ...]) -> str:
    """`("spec", "pod", "tolerations", 0, "key")` as `spec.pod.tolerations[0].key`."""
    text = ""
    for part in loc:
        if part == "[key]":
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _shown(kind: str, value: object) -> str:
    if kind in ("missing", "extra_forbidden", "rule"):
        return ""
    text = repr(value)
    return f" (got {text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + '…'})"
