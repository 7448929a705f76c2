"""No row makes the reader fail: what has an unexpected type is refused, whatever its shape is."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_trainer.data.reading import rows

_USER = {"role": "user", "content": "q"}
_ANSWER = {"role": "assistant", "content": "a"}
_CALL = '{"name": "f", "arguments": {"x": 1}}'
_SEEDS: dict[str, dict[str, Any]] = {
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": _CALL},
                                   {"from": "observation", "value": "5"}, {"from": "gpt", "value": "a"}],
                 "tools": [{"name": "f"}]},
    "Anthropic": {"messages": [
        _USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "r"}]}]}, _ANSWER],
        "tools": [{"name": "f", "input_schema": {}}]},
    "Gemini": {"contents": [
        {"role": "user", "parts": [{"text": "q"}]},
        {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {}}}]},
        {"role": "model", "parts": [{"text": "a", "thought": True}, {"text": "b"}]}],
        "systemInstruction": {"parts": [{"text": "S"}]}, "tools": [{"functionDeclarations": [{"name": "f"}]}]},
    "Bedrock": {"messages": [
        {"role": "user", "content": [{"text": "q"}]},
        {"role": "assistant", "content": [{"toolUse": {"toolUseId": "1", "name": "f", "input": {}}},
                                          {"reasoningContent": {"reasoningText": {"text": "h"}}}]},
        {"role": "user", "content": [{"toolResult": {"toolUseId": "1", "content": [{"json": {}}]}}]}, _ANSWER],
        "toolConfig": {"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {}}}}]}},
    "the Responses API": {"messages": [
        _USER, {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "r"}, _ANSWER]},
    "OpenAI and Hermes": {"messages": [
        _USER, {"role": "assistant", "content": "<think>h</think>a", "function_call": {"name": "f"},
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "<tool_response>x</tool_response>"},
        {"role": "assistant", "content": f"<tool_call>{_CALL}</tool_call>"}],
        "tools": [{"type": "function", "function": {"name": "f"}}]},
    "xLAM": {"query": "q", "answers": f"[{_CALL}]", "tools": "[]"},
    "Prodigy": {"text": "Alice", "spans": [{"start": 0, "end": 5, "label": "X"}], "answer": "accept",
                "options": [{"id": 1, "text": "a"}], "accept": [1]},
    "Doccano": {"text": "Alice", "entities": [{"id": 1, "start_offset": 0, "end_offset": 5, "label": "X"}],
                "relations": [{"from_id": 1, "to_id": 1, "type": "t"}]},
    "Argilla": {"text": "Alice", "label": [[0, 5, "X"]], "status": "v", "annotation": ["a"]},
    "a pair": {"prompt": "q", "chosen": [_USER, _ANSWER], "rejected": [_USER, _ANSWER], "messages": [_USER],
               "conversation": [_USER]},
    "an object of lists": {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
    "two lists": {"prompt": [_USER], "completion": [_ANSWER], "tools": '[{"name": "f"}]', "images": ["x"]},
}  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, 0, -1, True, 1.5, 10**30, "", "x", "[", "[]", "{}", _CALL, "<tool_call>", "\ud800", "\u200b", "user",
    "tool_call", [], {}, [None], [[]], {"a": 1}, {"role": "user"}, ["x"], {"text": None}, {"name": 5},
)  # fmt: skip
_KEYS = ("role", "from", "content", "value", "parts", "type", "name", "tool_calls", "label", "function", "\ud800")


@pytest.mark.parametrize("name", _SEEDS)
@pytest.mark.parametrize("format", ["auto", "preference"])
def test_no_row_makes_the_reader_fail(name: str, format: str) -> None:
    choice = random.Random(f"{name} {format}")
    for _ in range(400):
        row = _mutated(_SEEDS[name], choice)
        read = rows.parse([json.dumps(row).encode()], format)
        assert len(read.rows) + len(read.problems) == 1
        for problem in read.problems:
            problem.message.encode()
        for subject in (subject for usable in read.rows for _, subject, _ in usable.unread):
            subject.encode()


def _mutated(value: dict[str, Any], choice: random.Random) -> dict[str, Any]:
    """Returns a copy with up to three values replaced, removed or added."""
    mutated = copy.deepcopy(value)
    for _ in range(choice.randint(1, 3)):
        holder, key = choice.choice([*_places(mutated), (mutated, choice.choice(_KEYS))])
        replacement = copy.deepcopy(choice.choice(_VALUES))
        if choice.random() < 0.6:
            holder[key] = replacement
        elif isinstance(holder, dict):
            holder.pop(key, None)
            holder[choice.choice(_KEYS)] = replacement
        else:
            holder.insert(key, replacement)
    return mutated


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each place in a value, as its list or object and the index or key."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
