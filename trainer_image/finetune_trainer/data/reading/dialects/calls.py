"""Reads calls of functions that a dialogue holds as texts, or as items of their own.

ShareGPT, LLaMA-Factory and ms-swift have turns whose role is the call and whose text is its JSON;
Hermes has tags inside an answer; the Responses API has items without a role. The module is pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading import reasoning
from finetune_trainer.data.reading.containers import json_text

ROLES = frozenset(("function_call", "tool_call", "function-call", "tool_calls"))
"""Roles of turns that are calls."""
_ARGUMENTS = ("arguments", "parameters")
_CALL_KEYS = frozenset(("name", "id", "type", *_ARGUMENTS))
_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_RESULTS = re.compile(r"(?:\s*<tool_response>(?:(?!</?tool_response>).)*</tool_response>)+\s*", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_DESCRIBED = ("<tools>", "<tool_call>")
"""What a system prompt has that says how calls are to be written."""


def of_value(value: Any) -> list[dict[str, Any]]:
    """Return the calls that a value, or its JSON text, holds: an object with a name and arguments,
    or a list of them. It is empty if there is anything else, which would be lost."""
    if isinstance(value, str):
        try:
            value = json_text.decode(value)
        except (ValueError, RecursionError):
            return []
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list):
        return []
    calls = [_call(entry) for entry in entries]
    return [call for call in calls if call] if all(calls) else []


def _call(entry: Any) -> dict[str, Any] | None:
    if not isinstance(entry, Mapping):
        return None
    inner = entry.get("function", entry)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        return None
    if not _CALL_KEYS.issuperset(inner) or not {*_CALL_KEYS, "function"}.issuperset(entry):
        return None
    names = [key for key in _ARGUMENTS if key in inner]
    if len(names) > 1:
        return None
    arguments = inner[names[0]] if names else {}
    identity = {"id": entry["id"]} if isinstance(entry.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def of_turn(turn: Mapping[str, Any], key: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the text and the calls of a turn whose role is a call; no calls if its text isn't the
    JSON of any. `key` is that of its text, which may begin with reasoning."""
    value = turn.get(key)
    if not isinstance(value, str):
        return "", of_value(value)
    calls = of_value(value)
    if calls or not reasoning.inline(value):
        return "", calls
    rest = reasoning.without_block(value)
    return value[: len(value) - len(rest)].strip(), of_value(rest)


def of_tags(content: str) -> tuple[str, list[dict[str, Any]]]:
    """Return an answer without the tagged calls at its end, and these calls; no calls if one of
    them can't be read, or if text follows them."""
    end, texts = _tagged_end(content)
    called = [of_value(text) for text in texts]
    if not called or not all(called):
        return content, []
    return content[:end], [call for group in called for call in group]


def _tagged_end(content: str) -> tuple[int, list[str]]:
    """Return where the tagged texts at the end of an answer begin, without the space before them,
    and these texts. It takes time in proportion to the answer, whatever is in there."""
    end, texts = len(content.rstrip()), list[str]()
    while content.endswith(_CLOSING, 0, end):
        begin = content.rfind(_OPENING, 0, end)
        text = content[begin + len(_OPENING) : end - len(_CLOSING)]
        if begin < 0 or _CLOSING in text:
            break
        texts.append(text)
        end = begin
        while end and content[end - 1].isspace():
            end -= 1
    return end, texts[::-1]


def results_of_tags(content: str) -> list[str]:
    """Return the results that a text consists of, each of which has tags around it."""
    return _RESULT.findall(content) if _RESULTS.fullmatch(content) else []


def is_described(content: Any) -> bool:
    """Whether a system prompt says how calls are to be written, so that they are text."""
    return isinstance(content, str) and any(tag in content for tag in _DESCRIBED)
