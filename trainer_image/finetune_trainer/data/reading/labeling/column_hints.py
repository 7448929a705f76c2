"""Says which of a record's keys dataset.columns could name. The module is pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_QUESTIONS = ("question", "query", "instruction", "input", "prompt", "problem", "source", "context")
_ANSWERS = ("completion", "response", "answer", "output", "ideal", "target", "solution", "summary")
_SHOWN = 8


def unknown_keys(value: Mapping[str, Any]) -> str:
    """Return the message about a record whose keys belong to no format, with a proposal if some of
    them look like a question and an answer, or like turns."""
    names = sorted(map(str, value))
    keys = ", ".join(names[:_SHOWN]) or "none"
    if "input_ids" in value:
        return "is tokenized already (input_ids); give the texts, because the model's tokenizer is used here"
    proposal = _proposal(value)
    remedy = f", such as {{{proposal}}}" if proposal else ""
    return (
        f"has neither prompt and completion nor messages, text, instruction and output, or conversations (its keys: "
        f"{keys}); map its keys in dataset.columns{remedy}"
    )


def _proposal(value: Mapping[str, Any]) -> str:
    texts = [name for name, inner in value.items() if isinstance(inner, str | int | float)]
    answer = next((name for name in _ANSWERS if name in texts), None)
    for name, inner in value.items():
        if isinstance(inner, list) and inner and all(isinstance(turn, Mapping) for turn in inner):
            if "role" in inner[0]:
                return f"prompt: {name}, completion: {answer}" if answer else f"messages: {name}"
            if "from" in inner[0]:
                return f"conversations: {name}"
    questions = [name for name in _QUESTIONS if name in texts and name != answer]
    if answer is None or not questions:
        return ""
    if "instruction" in questions and "context" in questions:
        return f"instruction: instruction, input: context, output: {answer}"
    system = next((f", system: {name}" for name in ("system_prompt", "system") if name in texts), "")
    return f"prompt: {questions[0]}, completion: {answer}{system}"
