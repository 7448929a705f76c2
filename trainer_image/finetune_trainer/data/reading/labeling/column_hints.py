"""Says which of a record's keys dataset.columns could name. The module is pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading.row import printable

_QUESTIONS = (
    "question", "query", "instruction", "input", "prompt", "problem", "text_input", "input_text", "inputs", "article",
    "document", "dialogue", "source", "context",
)  # fmt: skip
_ANSWERS = (
    "completion", "response", "answer", "output", "ideal", "target", "solution", "output_text", "targets", "highlights",
    "summary", "generation",
)  # fmt: skip
_SPEAKERS = re.compile(r"^\s*(USER|ASSISTANT|Human|Assistant|User|Q|A)\s*:", re.MULTILINE)
_SHOWN = 8


def unknown_keys(value: Mapping[str, Any]) -> str:
    """Return the message about a record whose keys belong to no format, with a proposal if some of
    them look like a question and an answer, or like turns."""
    names = sorted(map(printable, value))
    keys = ", ".join(names[:_SHOWN]) or "none"
    if "input_ids" in value:
        return "is tokenized already (input_ids); give the texts, because the model's tokenizer is used here"
    dialogue = next((name for name, inner in value.items() if isinstance(inner, str) and _is_dialogue(inner)), None)
    if dialogue is not None:
        return (
            f"its {dialogue} is a dialogue as one text; write each of its turns as an object in messages, or set "
            f"dataset.columns {{text: {dialogue}}} to train on it as a document"
        )
    proposal = _proposal(value)
    remedy = f", such as {{{proposal}}}" if proposal else ""
    return (
        f"has neither prompt and completion nor messages, text, instruction and output, or conversations (its keys: "
        f"{keys}); map its keys in dataset.columns{remedy}"
    )


def _is_dialogue(text: str) -> bool:
    """Whether the turns of several speakers are in one text."""
    return len({match.group(1) for match in _SPEAKERS.finditer(text[:2000])}) > 1


def _proposal(value: Mapping[str, Any]) -> str:
    texts = [name for name, inner in value.items() if isinstance(inner, str | int | float)]
    lower = {name.lower(): name for name in reversed(texts)}
    answer = next((lower[name] for name in _ANSWERS if name in lower), None)
    for name, inner in value.items():
        if isinstance(inner, list) and inner and all(isinstance(turn, Mapping) for turn in inner):
            if "role" in inner[0]:
                return f"prompt: {name}, completion: {answer}" if answer else f"messages: {name}"
            if "from" in inner[0]:
                return f"conversations: {name}"
    questions = [lower[name] for name in _QUESTIONS if name in lower and lower[name] != answer]
    if answer is None or not questions:
        return ""
    if "instruction" in questions and "context" in questions:
        return f"instruction: instruction, input: context, output: {answer}"
    system = next((f", system: {name}" for name in ("system_prompt", "system") if name in texts), "")
    return f"prompt: {questions[0]}, completion: {answer}{system}"
