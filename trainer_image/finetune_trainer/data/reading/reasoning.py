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
_OPEN = rf"(?:<({_TAG})>|\[THINK\]|<\|begin_of_thought\|>|◁think▷)"
_BLOCK = re.compile(
    rf"\s*(?:<({_TAG})>(.*?)</\1>|\[THINK\](.*?)\[/THINK\]|<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>"
    r"|◁think▷(.*?)◁/think▷)\s*",
    re.DOTALL,
)
_LONE_END = re.compile(rf"</{_TAG}>[ \t]*(?:\n\s*|$)")
"""The end of reasoning that the prompt has begun, so that the text of an answer begins with it."""
_FIRST = frozenset("<[◁")
_ANY_OPEN = re.compile(rf"<{_TAG}>")
_BEGINNING = re.compile(rf"\s*{_OPEN}")
_CLOSING = re.compile(rf"\s*(?:</{_TAG}>|\[/THINK\]|<\|end_of_thought\|>|◁/think▷)\s*")
_OPENED = re.compile(rf"(?:<({_TAG})>|\[THINK\])\s*$")
_CLOSED = re.compile(rf"(?:(?:<{_TAG}>|\[THINK\])\s*)?(?:</{_TAG}>|\[/THINK\])\s*$")
_OPENING = re.compile(rf"\s*(?:<{_TAG}>|\[THINK\])\s*")


def of(turn: Turn) -> str:
    """Return the reasoning of a turn; empty if it has none."""
    return _of_keys(turn) or inline(turn.content)


def inline(content: str) -> str:
    """Return the reasoning in a block at the beginning of a text; empty if it has none."""
    block = _block(content)
    return block[0].strip() if block else ""


def fault(turn: Turn) -> str:
    """Return why a turn's reasoning isn't followed by an answer: OpenReasoning if it never ends, as
    in an answer that was cut off, ReasoningOnly if nothing comes after it, or an empty string."""
    content = turn.content
    if not content or content.isspace():
        return "ReasoningOnly" if turn.more and _of_keys(turn) and "tool_calls" not in json.loads(turn.more) else ""
    block = _block(content)
    if block is not None:
        return "ReasoningOnly" if not turn.more and not content[block[1] :].strip() else ""
    return "OpenReasoning" if _may_begin(content) and _BEGINNING.match(content) else ""


def without_block(content: str) -> str:
    """Return a text without a block of reasoning at its beginning."""
    block = _block(content)
    return content[block[1] :] if block else content


def _may_begin(content: str) -> bool:
    return content[:1] in _FIRST or (content[:1].isspace() and content.lstrip()[:1] in _FIRST)


def _block(content: str) -> tuple[str, int] | None:
    """Return the reasoning with which a text begins, and where the rest of the text begins."""
    if _may_begin(content):
        block = _BLOCK.match(content)
        return (next((text for text in block.groups()[1:] if text), ""), block.end()) if block else None
    end = _LONE_END.search(content) if "</" in content else None
    if end is None or _ANY_OPEN.search(content, 0, end.start()):
        return None
    return content[: end.start()], end.end()


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
