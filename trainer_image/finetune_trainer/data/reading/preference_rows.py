"""Reads preference pairs: a record with a chosen and a rejected answer becomes one row.

The row becomes one example with one prompt, which ends where the first answer begins that differs
between the two sides. The module doesn't import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from finetune_trainer.data.reading.row import Row, missing, short_repr
from finetune_trainer.data.reading.turns import role

FORMAT = "preference"
_RANKED = ("responses", "completions", "answers", "ranking", "scores", "answer_0", "answer_1", "response_a",
           "response_b", "winner")  # fmt: skip
_KEYS = ("prompt", "chosen", "rejected", "label")


def row(number: int, value: Mapping[str, Any], texts: Callable[..., Row], messages: Callable[..., Row]) -> Row:
    """Read a record whose answers are strings with a prompt, or lists of turns with or without one.

    `texts` and `messages` read a record that has a single answer. Raises ValueError.
    """
    sides = {key: _side(number, value, key, texts, messages) for key in ("chosen", "rejected")}
    return replace(sides["chosen"], rejected=sides["rejected"].turns)


def _side(
    number: int, value: Mapping[str, Any], key: str, texts: Callable[..., Row], messages: Callable[..., Row]
) -> Row:
    if key not in value:
        if "completion" in value and ("label" in value or "kto_tag" in value):
            raise ValueError(
                "has one answer with a label (a row for KTO, which isn't supported); give chosen and rejected answers"
            )
        ranked = [name for name in _RANKED if name in value]
        if ranked:
            raise ValueError(
                f"has answers that are ranked or scored ({', '.join(ranked)}), which isn't supported; write a row with "
                "prompt, chosen and rejected for each comparison"
            )
        raise ValueError(missing(value, key))
    rest = {name: content for name, content in value.items() if name not in _KEYS}
    answer, prompt = value[key], value.get("prompt")
    try:
        if isinstance(prompt, list) and isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if isinstance(answer, list):
            return messages(number, {**rest, "messages": _joined(prompt, answer, key)})
        return texts(number, {**rest, **({"prompt": prompt} if "prompt" in value else {}), "completion": answer})
    except ValueError as error:
        message = str(error).replace("completion", key)
        raise ValueError(message if message.startswith((key, "prompt")) else f"{key}: {message}") from None


def _joined(prompt: Any, answer: list[Any], key: str) -> list[Any]:
    """Return the dialogue of a prompt and an answer, which may be the complete dialogue already."""
    if not isinstance(prompt, str | list):
        return answer
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    without_system = before[1:] if _role(before[:1]) == "system" != _role(answer[:1]) else before
    start = 1 if _role(answer[:1]) == "system" != _role(before[:1]) else 0
    length = start + len(without_system)
    if [_content(turn) for turn in answer[start:length]] == [_content(turn) for turn in without_system]:
        return answer if start else [*before, *answer[length:]]
    if _role(answer[:1]) not in ("system", "user") or _role(before[-1:]) == "assistant":
        return [*before, *answer]
    if isinstance(prompt, str) and any(_content(turn) == _content(before[0]) for turn in answer):
        return answer
    question: Any = next((turn for turn in answer if _role([turn]) == "user"), {})
    raise ValueError(
        f"{key} begins with a user turn ({short_repr(question.get('content'))}) that isn't the prompt; give the prompt "
        "once, in prompt or as the first turns of chosen and rejected"
    )


def _role(turns: list[Any]) -> Any:
    return role(turns[0]) if turns and isinstance(turns[0], Mapping) else None


def _content(turn: Any) -> Any:
    """Return what makes two turns the same."""
    if not isinstance(turn, Mapping):
        return turn
    content = turn.get("content", turn.get("value"))
    return role(turn), content.strip() if isinstance(content, str) else content


def sides(pair: Row) -> tuple[Row, ...]:
    """Return a pair as two rows, chosen and rejected, and any other row as itself."""
    if not pair.rejected:
        return (pair,)
    return tuple(replace(pair, turns=turns, rejected=()) for turns in (pair.turns, pair.rejected))
