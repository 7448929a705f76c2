"""Parses the turns of a conversation as chat APIs have them: objects with role and content.

A ValueError names the path of what is wrong. The module is pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading import content_parts, reasoning
from finetune_trainer.data.reading.containers import json_text
from finetune_trainer.data.reading.dialects import messages
from finetune_trainer.data.reading.row import ROLES, Turn, printable, short_repr, text

FURTHER_KEYS = ("tool_calls", "tool_call_id", "name", *reasoning.KEYS)
"""Keys of a turn that are given to the chat template."""
_ARGUMENTS = ("parameters", "args", "input")
"""Other names of a call's arguments."""
_OF_CALLS = ("id", "type", "index")
"""Keys of a call beside its function."""
LOSS_KEYS = ("weight", "train", "loss", "training")
"""Keys that say whether an assistant's turn is trained on."""
_LOSS = frozenset(LOSS_KEYS)
_FURTHER = frozenset((*FURTHER_KEYS, "function_call"))
_ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "function_call": "assistant", "function": "tool", "observation": "tool",
    "function_response": "tool", "ai": "assistant", "tool_call": "assistant",
    "tool_response": "tool", "developer": "system", "function-call": "assistant", "tool_calls": "assistant",
    "function-response": "tool", "ipython": "tool", "chatbot": "assistant",
}  # fmt: skip
"""Names of roles in ShareGPT and of other tools."""


def turns(value: Any, path: str, *, has_tools: bool = False) -> tuple[Turn, ...]:
    """Parse a list of objects with role and content, as chat APIs have them.

    `path` is what messages call the list. `has_tools` is whether the row has a list of tools.
    Raises ValueError.
    """
    value = parsed_list(value)
    if isinstance(value, str):
        repeated = json_text.repeated_key(value)
        raise ValueError(
            f"{path} {repeated}"
            if repeated
            else f"{path} is {short_repr(value)}, a text that isn't a JSON list of turns; write the list, or its JSON "
            "(json.dumps)"
        )
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path} is {short_repr(value)}; it must be a list with at least one turn")
    if messages.are_plain(value, has_tools=has_tools):
        return tuple(_turn(f"{path}[{index}]", turn) for index, turn in enumerate(value))
    roles = [role(turn) if isinstance(turn, Mapping) else None for turn in value]
    translated = messages.translated(value, roles, has_tools=has_tools)
    return tuple(_turn(f"{path}[{index}]", turn, as_text) for index, turn, as_text in translated)


def parsed_list(value: Any) -> Any:
    """Return the list that a text holds as JSON, as CSV and parquet files have it, or the turns of
    an object of lists, as `datasets` stores a sequence of objects; else the value itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json_text.decode(value)
        except (ValueError, RecursionError):
            return value
        if all(isinstance(turn, Mapping) for turn in parsed):
            return parsed
    if isinstance(value, Mapping) and _is_of_lists(value):
        return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value


def _is_of_lists(value: Mapping[str, Any]) -> bool:
    lists = list(value.values())
    return (
        all(isinstance(inner, list) and len(inner) == len(lists[0]) for inner in lists)
        and any(key in value for key in ("role", "from"))
        and bool(lists[0])
    )


def role(turn: Mapping[str, Any]) -> Any:
    """Return the role of a turn by our name for it, or what it has instead."""
    name = turn.get("role", turn.get("from"))
    return _ALIASES.get(name.lower(), name.lower()) if isinstance(name, str) else name


def is_in_loss(path: str, turn: Mapping[str, Any]) -> bool:
    """Whether none of the keys of a turn keeps it out of the loss.

    Raises ValueError for a value that is neither yes nor no.
    """
    if _LOSS.isdisjoint(turn):
        return True
    for key in LOSS_KEYS:
        mark = turn.get(key)
        if mark is not None and mark not in (0, 1):
            raise ValueError(f"{path}.{key} is {short_repr(mark)}; it must be 0 (not trained on) or 1")
    return all(turn.get(key) in (None, 1) for key in LOSS_KEYS)


def _turn(path: str, turn: Any, as_text: str = "") -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"{path} is {short_repr(turn)}; it must be an object with role and content")
    name = role(turn)
    if name not in ROLES:
        key = "role" if "role" in turn or "from" not in turn else "from"
        names = ROLES if key == "role" else (*ROLES, *_ALIASES)
        raise ValueError(f"{path}.{key} is {short_repr(turn.get(key))}; it must be one of {', '.join(names)}")
    in_loss = is_in_loss(path, turn)
    key = "value" if turn.get("content") is None and "value" in turn else "content"
    content, thought = turn.get(key), ""
    if type(content) is not str:
        content, thought = content_parts.text_and_reasoning(content, f"{path}.{key}", name)
    further = {} if not thought and _FURTHER.isdisjoint(turn) else _further(turn, path, thought)
    if content is None and "tool_calls" in further:
        content = ""
    elif not isinstance(content, str) or not content.isascii():
        content = text(turn if content is None else {**turn, key: content}, key, f"{path}.")
    more = canonical(further, path) if further else ""
    return Turn(name, content, in_loss=in_loss, more=more, as_text=as_text)


def _further(turn: Mapping[str, Any], path: str, thought: str) -> dict[str, Any]:
    """Return what a turn has beside its content. `thought` is the reasoning among its parts."""
    further = {key: turn[key] for key in FURTHER_KEYS if turn.get(key)}
    if thought and not any(key in further for key in reasoning.KEYS):
        further["reasoning_content"] = thought
    for thinking in reasoning.KEYS:
        if not isinstance(further.get(thinking, ""), str):
            value = short_repr(further[thinking])
            raise ValueError(f"{path}.{thinking} is {value}, which isn't text; write the reasoning as a string")
    if turn.get("function_call") and "tool_calls" not in further:
        called = json_text.decoded(turn["function_call"], f"{path}.function_call")
        further = {"tool_calls": [{"type": "function", "function": called}], **further}
    if "tool_calls" in further:
        further["tool_calls"] = _calls(further["tool_calls"], f"{path}.tool_calls")
        if not further["tool_calls"]:
            del further["tool_calls"]
    return further


def _calls(value: Any, path: str) -> list[Any]:
    """Parse tool calls, or their JSON text, as CSV and parquet files have them.

    APIs give their arguments as JSON text, but chat templates serialize objects themselves.
    """
    value = json_text.decoded(value, path)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise ValueError(f"{path} is {short_repr(value)}; it must be a list of calls")
    return [_call(call, f"{path}[{index}]") for index, call in enumerate(value)]


def _call(call: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a call as APIs have it: a function with its name and arguments, and the call's id."""
    inner, inner_path = call.get("function"), f"{path}.function"
    if not isinstance(inner, Mapping):
        outer = {key: call[key] for key in _OF_CALLS if key in call}
        inner, inner_path = {key: value for key, value in call.items() if key not in _OF_CALLS}, path
        call = {"type": "function", **outer}
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        keys = ", ".join(map(printable, inner)) or "nothing"
        raise ValueError(f"{inner_path} has no name of a function (it has {keys}); write it in name")
    name = next((key for key in ("arguments", *_ARGUMENTS) if key in inner), None)
    arguments = {} if name is None else inner[name]
    if isinstance(arguments, str):
        arguments = (
            json_text.decoded(arguments, f"{inner_path}.{name}", "an object, or its JSON") if arguments.strip() else {}
        )
    if name is not None:
        inner = {("arguments" if key == name else key): value for key, value in inner.items()}
        inner["arguments"] = arguments
    return {**call, "function": inner}


def canonical(value: Any, path: str) -> str:
    try:
        serialized = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        serialized.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path} contains half a character (a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be written as JSON ({error})") from None
    return serialized
