"""Reads the content of a turn that is more than a text: parts of several types, or an object.

The shapes are those of OpenAI, Anthropic and Bedrock. A ValueError names the path of what is wrong.
The module is pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading.row import short_repr, text

_TEXTS = ("text", "input_text", "output_text")
_THOUGHTS = {"thinking": "thinking", "reasoning": "text"}
_REMEDIES = {
    "tool_use": "write it in the turn's tool_calls",
    "tool_result": "write it as a turn of the role tool",
    "refusal": "write it as text if it should be trained on",
}
_OTHER_MEDIA = "remove the part, or the row"


def text_and_reasoning(content: Any, path: str, role: str) -> tuple[Any, str]:
    """Return the text of a content that has parts, and the reasoning among them. Any other content
    is returned as it is, except that the result of a tool may be any JSON.
    """
    if isinstance(content, Mapping) and content.get("type") in _TEXTS:
        content = [content]
    if isinstance(content, list) and not (role == "tool" and not _has_parts(content)):
        texts = [_part(f"{path}[{index}]", part, role) for index, part in enumerate(content)]
        thoughts = [part for part, is_thought in texts if is_thought]
        return "".join(part for part, is_thought in texts if not is_thought), "\n".join(thoughts)
    if isinstance(content, list | Mapping) and role == "tool":
        return json.dumps(content, ensure_ascii=False), ""
    return content, ""


def _has_parts(content: list[Any]) -> bool:
    return any(isinstance(part, Mapping) and ("type" in part or "text" in part) for part in content)


def _part(path: str, part: Any, role: str) -> tuple[str, bool]:
    """Return the text of a part, and whether it is reasoning."""
    if isinstance(part, str):
        return text({path: part}, path), False
    if not isinstance(part, Mapping):
        raise ValueError(f"{path} is {short_repr(part)}; it must be a text or a part of type text")
    kind = part.get("type", "text" if "text" in part else None)
    if "reasoningContent" in part and role == "assistant":
        kind, part = "reasoning", _reasoning_of_bedrock(part["reasoningContent"])
    if kind in _TEXTS:
        return text(part, "text", f"{path}."), part.get("thought") is True  # Gemini
    if isinstance(kind, str) and kind in _THOUGHTS and role == "assistant":
        return text(part, _THOUGHTS[kind], f"{path}."), True
    remedy = _REMEDIES.get(kind, _OTHER_MEDIA) if isinstance(kind, str) else _OTHER_MEDIA
    raise ValueError(f"{path} is of type {short_repr(kind)}, which isn't text; {remedy}")


def _reasoning_of_bedrock(value: Any) -> Mapping[str, Any]:
    inner = value.get("reasoningText") if isinstance(value, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}
