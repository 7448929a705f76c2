"""Gives rows of other tools the keys of messages: Gemini's contents, Bedrock's toolConfig, and the
question with its calls of xLAM. The module is pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading.dialects import calls

_SYSTEM = ("systemInstruction", "system_instruction")
_XLAM = ("query", "answers", "tools")
_READ = frozenset(("contents", "toolConfig", "answers"))


def normalized(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record with messages, system and tools; what was read under other names is gone. Any
    other record is returned as it is."""
    if _READ.isdisjoint(record):
        return record
    if "messages" in record:
        config = record.get("toolConfig")
        return _with_tools(record, config) if isinstance(config, Mapping) and "tools" not in record else record
    if isinstance(record.get("contents"), list):
        return _of_gemini(record)
    if all(key in record for key in _XLAM) and calls.of_value(record["answers"]):
        rest = {key: value for key, value in record.items() if key not in ("query", "answers")}
        question = {"role": "user", "content": record["query"]}
        return {**rest, "messages": [question, {"role": "tool_call", "content": record["answers"]}]}
    return record


def _with_tools(record: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    rest = {key: value for key, value in record.items() if key != "toolConfig"}
    more = {key: value for key, value in config.items() if key != "tools"}
    return {**rest, "tools": config.get("tools"), **({"toolConfig": more} if more else {})}


def _of_gemini(record: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [key for key in _SYSTEM if key in record]
    rest = {key: value for key, value in record.items() if key != "contents" and key not in names[:1]}
    turns = [
        {"role": "user", **turn} if isinstance(turn, Mapping) and "role" not in turn else turn
        for turn in record["contents"]
    ]
    if names:
        instruction = record[names[0]]
        content = instruction.get("parts") if isinstance(instruction, Mapping) else instruction
        turns = [{"role": "system", "content": content}, *turns]
    return {**rest, "messages": turns}
