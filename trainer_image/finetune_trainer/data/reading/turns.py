"""Parses the turns of a conversation as chat APIs have them: objects with role and content.

A ValueError names the path of what is wrong. The module is pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading.row import ROLES, Turn, short_repr, text

FURTHER_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""Keys of a turn that are given to the chat template."""
LOSS_KEYS = ("weight", "train", "loss")
"""Keys that say whether an assistant's turn is trained on."""
_ALIASES = {"developer": "system", "function": "tool", "human": "user", "ai": "assistant"}


def turns(value: Any, path: str) -> tuple[Turn, ...]:
    """Parse a list of objects with role and content, as chat APIs have them.

    `path` is what messages call the list. Raises ValueError.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path} isn't a list with at least one turn")
    return tuple(_turn(f"{path}[{index}]", turn) for index, turn in enumerate(value))


def is_in_loss(path: str, turn: Mapping[str, Any]) -> bool:
    """Whether none of the keys of a turn keeps it out of the loss.

    Raises ValueError for a value that is neither yes nor no.
    """
    for key in LOSS_KEYS:
        mark = turn.get(key)
        if mark is not None and mark not in (0, 1):
            raise ValueError(f"{path}.{key} is {short_repr(mark)}; it must be 0 (not trained on) or 1")
    return all(turn.get(key) in (None, 1) for key in LOSS_KEYS)


def _turn(path: str, turn: Any) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{path} isn't an object with role and content")
    role = turn.get("role")
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{path}.role is {short_repr(role)}; it must be one of {', '.join(ROLES)}")
    in_loss = is_in_loss(path, turn)
    further = {key: turn[key] for key in FURTHER_KEYS if turn.get(key)}
    if turn.get("function_call") and "tool_calls" not in further:
        further = {"tool_calls": [{"type": "function", "function": turn["function_call"]}], **further}
    if "tool_calls" in further:
        further["tool_calls"] = _calls(further["tool_calls"], f"{path}.tool_calls")
    content = turn.get("content")
    if content is None and "tool_calls" in further:
        content = ""
    elif isinstance(content, list):
        content = "".join(_part(f"{path}.content[{index}]", part) for index, part in enumerate(content))
    else:
        content = text(turn, "content", f"{path}.")
    return Turn(role, content, in_loss=in_loss, more=canonical(further, path) if further else "")


def _calls(value: Any, path: str) -> list[Any]:
    """Parse tool calls.

    APIs give their arguments as JSON text, but chat templates serialize objects themselves.
    """
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise ValueError(f"{path} isn't a list of calls")
    return [_call(call) for call in value]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _call(inner)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return dict(call)
        if isinstance(parsed, Mapping):
            return {**call, "arguments": parsed}
    return dict(call)


def _part(path: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise ValueError(f"{path} is of type {short_repr(kind)}; only text is supported")
    return text(part, "text", f"{path}.")


def canonical(value: Any, path: str) -> str:
    try:
        serialized = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        serialized.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path} contains half a character (a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be written as JSON ({error})") from None
    return serialized
