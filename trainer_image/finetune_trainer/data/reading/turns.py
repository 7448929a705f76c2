"""Parses the turns of a conversation as chat APIs have them: objects with role and content.

A ValueError names the path of what is wrong. The module is pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading import content_parts, reasoning
from finetune_trainer.data.reading.row import ROLES, Turn, short_repr, text

FURTHER_KEYS = ("tool_calls", "tool_call_id", "name", *reasoning.KEYS)
"""Keys of a turn that are given to the chat template."""
LOSS_KEYS = ("weight", "train", "loss")
"""Keys that say whether an assistant's turn is trained on."""
_ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "function_call": "assistant", "function": "tool", "observation": "tool",
    "function_response": "tool", "ai": "assistant", "tool_call": "assistant",
    "tool_response": "tool", "developer": "system",
}  # fmt: skip
"""Names of roles in ShareGPT and of other tools."""


def turns(value: Any, path: str) -> tuple[Turn, ...]:
    """Parse a list of objects with role and content, as chat APIs have them.

    `path` is what messages call the list. Raises ValueError.
    """
    value = parsed_list(value)
    if isinstance(value, str):
        raise ValueError(
            f"{path} is {short_repr(value)}, a text that isn't a JSON list of turns; write the list, or its JSON "
            "(json.dumps)"
        )
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path} is {short_repr(value)}; it must be a list with at least one turn")
    return tuple(_turn(f"{path}[{index}]", turn) for index, turn in enumerate(value))


def parsed_list(value: Any) -> Any:
    """Return the list that a text holds as JSON, as CSV and parquet files have it, or the value
    itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if all(isinstance(turn, Mapping) for turn in parsed):
            return parsed
    return value


def role(turn: Mapping[str, Any]) -> Any:
    """Return the role of a turn by our name for it, or what it has instead."""
    name = turn.get("role", turn.get("from"))
    return _ALIASES.get(name.lower(), name.lower()) if isinstance(name, str) else name


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
        raise ValueError(f"{path} is {short_repr(turn)}; it must be an object with role and content")
    name = role(turn)
    if name not in ROLES:
        key = "role" if "role" in turn or "from" not in turn else "from"
        names = ROLES if key == "role" else (*ROLES, *_ALIASES)
        raise ValueError(f"{path}.{key} is {short_repr(turn.get(key))}; it must be one of {', '.join(names)}")
    in_loss = is_in_loss(path, turn)
    key = "value" if turn.get("content") is None and "value" in turn else "content"
    content, thought = content_parts.text_and_reasoning(turn.get(key), f"{path}.{key}", name)
    further = {key: turn[key] for key in FURTHER_KEYS if turn.get(key)}
    if thought and not any(key in further for key in reasoning.KEYS):
        further["reasoning_content"] = thought
    for thinking in reasoning.KEYS:
        if not isinstance(further.get(thinking, ""), str):
            value = short_repr(further[thinking])
            raise ValueError(f"{path}.{thinking} is {value}, which isn't text; write the reasoning as a string")
    if turn.get("function_call") and "tool_calls" not in further:
        further = {"tool_calls": [{"type": "function", "function": turn["function_call"]}], **further}
    if "tool_calls" in further:
        further["tool_calls"] = _calls(further["tool_calls"], f"{path}.tool_calls")
    if content is None and "tool_calls" in further:
        content = ""
    elif not isinstance(content, str):
        content = text(turn if content is None else {**turn, key: content}, key, f"{path}.")
    return Turn(name, content, in_loss=in_loss, more=canonical(further, path) if further else "")


def _calls(value: Any, path: str) -> list[Any]:
    """Parse tool calls.

    APIs give their arguments as JSON text, but chat templates serialize objects themselves.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise ValueError(f"{path} is {short_repr(value)}; it must be a list of calls")
    return [_call(call, f"{path}[{index}]") for index, call in enumerate(value)]


def _call(call: Mapping[str, Any], path: str) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _call(inner, f"{path}.function")}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        return {**call, "arguments": json.loads(arguments) if arguments.strip() else {}}
    except (ValueError, RecursionError):
        raise ValueError(
            f"{path}.arguments is {short_repr(arguments)}, which isn't JSON; write an object, or its JSON"
        ) from None


def canonical(value: Any, path: str) -> str:
    try:
        serialized = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        serialized.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path} contains half a character (a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be written as JSON ({error})") from None
    return serialized
