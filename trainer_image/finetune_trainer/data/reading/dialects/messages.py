"""Translates turns that other tools write differently into messages with tool_calls and results.

One turn may become several messages, and several calls in a row become one answer, as chat
templates write it. The module is pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune_trainer.data.reading.dialects import calls, parts

_ITEMS = ("function_call", "function_call_output")  # of the Responses API
_PLAIN = frozenset(("user", "assistant", "system", "human", "gpt", "tool"))
_LOSS_KEYS = ("weight", "train", "loss", "training")


class Message(NamedTuple):
    """Holds a turn as a message.

    `place` is the index of the turn that it was, and `as_text` is what the row has instead of
    calls; it is empty if there is no such text.
    """

    place: int
    turn: Any
    as_text: str = ""


def are_plain(turns: Sequence[Any], *, has_tools: bool) -> bool:
    """Whether turns are messages already, as most are, so that none is translated. `has_tools` is
    as in `translated`."""
    try:
        return all(
            turn.get("role", turn.get("from")) in _PLAIN and _is_plain(turn.get("content", turn.get("value")), turn)
            for turn in turns
        ) and not (has_tools and any("<tool_" in (turn.get("content", turn.get("value")) or "") for turn in turns))
    except (AttributeError, TypeError):
        return False


def _is_plain(content: Any, turn: Mapping[str, Any]) -> bool:
    return type(content) is str or (content is None and "parts" not in turn and bool(turn.get("tool_calls")))


def translated(turns: Sequence[Any], roles: Sequence[Any], *, has_tools: bool) -> list[Message]:
    """Return messages for turns, whose `roles` are those by our names.

    `has_tools` is whether the row has a list of tools, so that the chat template and not the row
    says how calls are written.
    """
    tagged = has_tools and not any(calls.is_described(_text(turn)) for turn in turns[:1])
    written: list[Message] = []
    role_before: Any = None
    for index, (turn, role) in enumerate(zip(turns, roles, strict=True)):
        messages, is_call = _messages(index, turn, role, tagged=tagged) if isinstance(turn, Mapping) else ([], False)
        if is_call and role_before == "assistant" and _are_one(written[-1].turn, messages[0].turn):
            written[-1] = _joined(written[-1], messages[0])
        else:
            written += messages or [Message(index, turn)]
        role_before = "assistant" if is_call else role
    return written


def _messages(index: int, turn: Mapping[str, Any], role: Any, *, tagged: bool) -> tuple[list[Message], bool]:
    """Return the messages of a turn, none if it is one already, and whether it is only a call."""
    name = turn.get("role", turn.get("from"))
    if name is None:
        is_item = turn.get("type") in _ITEMS
        return ([Message(index, _of_item(turn))], turn["type"] == "function_call") if is_item else ([], False)
    content = turn.get("content")
    if "parts" in turn and content is None:
        content = turn["parts"]
        turn = {**{key: value for key, value in turn.items() if key != "parts"}, "content": content}
        return [Message(index, message) for message in parts.separated(turn, role)], False
    if isinstance(content, list):
        has_others = parts.has_others(content)
        return [Message(index, message) for message in parts.separated(turn, role)] if has_others else [], False
    key = "value" if content is None and "value" in turn else "content"
    if isinstance(name, str) and name.lower() in calls.ROLES and not turn.get("tool_calls"):
        before, called = calls.of_turn(turn, key)
        return ([_calling(index, turn, key, before, called)], True) if called else ([], False)
    return (_untagged(index, turn, key, role), False) if tagged else ([], False)


def _untagged(index: int, turn: Mapping[str, Any], key: str, role: Any) -> list[Message]:
    """Return an answer, or the results of tools, without the tags of Hermes."""
    content = turn.get(key)
    if not isinstance(content, str):
        return []
    if role == "assistant" and "<tool_call>" in content and not turn.get("tool_calls"):
        before, called = calls.of_tags(content)
        return [_calling(index, turn, key, before, called)] if called else []
    if role == "tool" and "<tool_response>" in content:
        return [Message(index, {**turn, key: result}) for result in calls.results_of_tags(content)]
    return []


def _of_item(item: Mapping[str, Any]) -> dict[str, Any]:
    identity = item.get("call_id") or item.get("id")
    if item["type"] == "function_call_output":
        return {"role": "tool", "content": item.get("output"), "tool_call_id": identity}
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {**({"id": identity} if identity else {}), "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _calling(index: int, turn: Mapping[str, Any], key: str, before: str, called: list[Any]) -> Message:
    rest = {name: value for name, value in turn.items() if name not in (key, "role", "from")}
    text = turn[key] if isinstance(turn[key], str) else json.dumps(turn[key], ensure_ascii=False)
    return Message(index, {**rest, "role": "assistant", "content": before, "tool_calls": called}, text)


def _are_one(answer: Mapping[str, Any], calling: Mapping[str, Any]) -> bool:
    """Whether calls are a part of the answer before them, which is a text that is trained on just
    as they are."""
    if isinstance(_text(answer), list) or not isinstance(answer.get("tool_calls") or [], list):
        return False
    return [answer.get(key) for key in _LOSS_KEYS] == [calling.get(key) for key in _LOSS_KEYS]


def _joined(answer: Message, calling: Message) -> Message:
    before = answer.as_text or _text(answer.turn)
    texts = [text for text in (before, calling.as_text) if isinstance(text, str) and text]
    content = "\n".join(
        text for text in (_text(answer.turn), calling.turn["content"]) if isinstance(text, str) and text
    )
    called = [*(answer.turn.get("tool_calls") or ()), *calling.turn["tool_calls"]]
    turn = {**answer.turn, "content": content, "tool_calls": called}
    return Message(answer.place, turn, "\n".join(texts) if calling.as_text else "")


def _text(turn: Any) -> Any:
    return turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
