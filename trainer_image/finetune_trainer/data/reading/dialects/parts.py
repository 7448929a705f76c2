"""Reads calls of functions and their results that are parts of a turn's content.

The shapes are those of Anthropic, Bedrock, Gemini and the AI SDK. Every other part is left to
`content_parts`. The module is pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Turn = Mapping[str, Any]


def has_others(content: list[Any]) -> bool:
    """Whether a content has parts that aren't texts."""
    return any(isinstance(part, Mapping) and "text" not in part for part in content)


def separated(turn: Turn, role: str) -> list[dict[str, Any]]:
    """Return a turn as messages: an answer with its calls in tool_calls, or the results of tools
    before the rest of a question. Parts that are no complete call or result stay where they are.
    """
    content = turn["content"] if isinstance(turn["content"], list) else [turn["content"]]
    rest: list[Any] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for part in content:
        call = _call(part) if role == "assistant" else None
        result = _result(part) if role in ("user", "tool") else None
        if call:
            calls.append(call)
        elif result:
            results.append(result)
        else:
            rest.append(part)
    earlier = turn.get("tool_calls") or []
    if calls and isinstance(earlier, list):
        return [{**turn, "content": rest or "", "tool_calls": [*earlier, *calls]}]
    if not results:
        return [dict(turn)]
    return [*results, *([{**turn, "content": rest}] if rest else [])]


def _call(part: Any) -> dict[str, Any] | None:
    if not isinstance(part, Mapping):
        return None
    name: Any = None
    if part.get("type") == "tool_use":
        name, arguments, identity = part.get("name"), part.get("input"), part.get("id")
    elif part.get("type") == "tool-call":
        name, arguments = part.get("toolName"), part.get("input", part.get("args"))
        identity = part.get("toolCallId")
    elif isinstance(inner := part.get("toolUse"), Mapping):
        name, arguments, identity = inner.get("name"), inner.get("input"), inner.get("toolUseId")
    elif isinstance(inner := part.get("functionCall", part.get("function_call")), Mapping):
        name, arguments, identity = inner.get("name"), inner.get("args"), inner.get("id")
    if not isinstance(name, str) or not name:
        return None
    known = {"id": identity} if isinstance(identity, str) else {}
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    return {**known, "type": "function", "function": function}


def _result(part: Any) -> dict[str, Any] | None:
    if not isinstance(part, Mapping):
        return None
    name: Any = None
    if part.get("type") == "tool_result":
        identity, content = part.get("tool_use_id"), part.get("content", "")
    elif part.get("type") == "tool-result":
        identity, name = part.get("toolCallId"), part.get("toolName")
        content = _unwrapped(part.get("output", part.get("result")))
    elif isinstance(inner := part.get("toolResult"), Mapping):
        identity, content = inner.get("toolUseId"), _unwrapped(inner.get("content", ""))
    elif isinstance(inner := part.get("functionResponse", part.get("function_response")), Mapping):
        identity, name, content = inner.get("id"), inner.get("name"), inner.get("response")
    else:
        return None
    known = {"tool_call_id": identity} if isinstance(identity, str) else {}
    named = {"name": name} if isinstance(name, str) else {}
    return {"role": "tool", **known, **named, "content": "" if content is None else content}


def _unwrapped(content: Any) -> Any:
    """Return the value of a result that is an object of a type and a value, or a list of one JSON
    value; anything else as it is."""
    if isinstance(content, Mapping) and set(content) == {"type", "value"}:
        return content["value"]
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping) and "json" in content[0]:
        return content[0]["json"]
    return content
