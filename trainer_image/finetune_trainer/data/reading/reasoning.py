"""Finds the reasoning of an answer: a key of its turn, or a block at the beginning of its text.

The module is pure.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from finetune_trainer.data.reading.row import Turn

KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn that hold reasoning, as chat APIs and templates name them."""
_TAG = r"(?:think|thinking|thought|reasoning|seed:think)"
_BLOCK = re.compile(rf"\s*(?:<({_TAG})>(.*?)</\1>|\[THINK\](.*?)\[/THINK\])\s*", re.DOTALL)
_CLOSING = re.compile(rf"\s*(?:</{_TAG}>|\[/THINK\])\s*")
_OPENED = re.compile(rf"(?:<({_TAG})>|\[THINK\])\s*$")
_CLOSED = re.compile(rf"(?:(?:<{_TAG}>|\[THINK\])\s*)?(?:</{_TAG}>|\[/THINK\])\s*$")
_OPENING = re.compile(rf"\s*(?:<{_TAG}>|\[THINK\])\s*")


def of(turn: Turn) -> str:
    """Return the reasoning of a turn; empty if it has none."""
    return _of_keys(turn) or inline(turn.content)


def inline(content: str) -> str:
    """Return the reasoning in a block at the beginning of a text; empty if it has none."""
    block = _BLOCK.match(content) if "<" in content or "[" in content else None
    return (block.group(2) or block.group(3) or "").strip() if block else ""


def without_block(content: str) -> str:
    """Return a text without a block of reasoning at its beginning."""
    block = _BLOCK.match(content) if "<" in content or "[" in content else None
    return content[block.end() :] if block else content


def removed(turn: Turn) -> Turn:
    """Return a turn without reasoning."""
    more = {key: value for key, value in json.loads(turn.more or "{}").items() if key not in KEYS}
    text = json.dumps(more, ensure_ascii=False, separators=(",", ":")) if more else ""
    return replace(turn, content=without_block(turn.content), more=text)


def length(turn: Turn, answer: str) -> int:
    """Return how many characters at the beginning of a rendered answer are its turn's reasoning."""
    reasoning = of(turn).strip()
    begin = answer.find(reasoning) if reasoning else -1
    if begin < 0:
        return 0
    closing = _CLOSING.match(answer, begin + len(reasoning))
    return closing.end() if closing else begin + len(reasoning)


def continued(before: str, full: str, turn: Turn) -> str | None:
    """Return the answer for a prompt that ends with a block of reasoning which `full` lacks.

    `before` is the prompt as at inference, which opens the block, or writes an empty one. `full` is
    the same dialogue with the answer. Returns None if they differ in another way.
    """
    opened, closed = _OPENED.search(before), _CLOSED.search(before)
    ending = opened or closed
    if ending is None or not full.startswith(before[: ending.start()]):
        return None
    rest = full[ending.start() :]
    if opened is None:
        return without_block(rest)
    opening = _OPENING.match(rest)
    if opening is not None:
        answer = rest[opening.end() :]
        # The template writes an empty block, but the row has reasoning.
        return f"{of(turn).strip()}\n{answer}" if of(turn).strip() and _CLOSING.match(answer) else answer
    tag = opened.group(1)
    return f"{of(turn).strip()}\n{f'</{tag}>' if tag else '[/THINK]'}\n\n{rest}"


def _of_keys(turn: Turn) -> str:
    if not turn.more:
        return ""
    more = json.loads(turn.more)
    return next((more[key] for key in KEYS if isinstance(more.get(key), str)), "")
