"""Preference pairs: a record with a chosen and a rejected answer → a row → one example. No torch.

Called by `rows` and `render`. The prompt, of which an example has one, ends where the answer begins in which the two
differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_trainer.render import Example
    from finetune_trainer.rows import Problem, Row

FORMAT = "preference"
_KEYS = ("prompt", "chosen", "rejected")


def is_pair(value: Mapping[str, Any]) -> bool:
    return "chosen" in value and "rejected" in value


def row(number: int, value: Mapping[str, Any], texts: Callable[..., Row], messages: Callable[..., Row]) -> Row:
    """Strings with a prompt, or lists of turns with or without one. `texts` and `messages` read a record with one
    answer. Raises ValueError."""
    answers = {key: _one(number, value, key, texts, messages) for key in ("chosen", "rejected")}
    return replace(answers["chosen"], rejected=answers["rejected"].turns)


def _one(
    number: int, value: Mapping[str, Any], key: str, texts: Callable[..., Row], messages: Callable[..., Row]
) -> Row:
    if key not in value:
        raise ValueError(f"{key} is missing")
    rest = {other: given for other, given in value.items() if other not in _KEYS}
    answer, prompt = value[key], value.get("prompt")
    try:
        if isinstance(answer, list):
            before = prompt if isinstance(prompt, list) else []
            if isinstance(prompt, str):
                before = [{"role": "user", "content": prompt}]
            return messages(number, {**rest, "messages": [*before, *answer]})
        return texts(number, {**rest, **({"prompt": prompt} if "prompt" in value else {}), "completion": answer})
    except ValueError as error:
        said = str(error).replace("completion", key)
        raise ValueError(said if said.startswith((key, "prompt")) else f"{key}: {said}") from None


def sides(pair: Row) -> tuple[Row, ...]:
    """The row itself, or a pair as two: with the chosen answer, and with the rejected one."""
    if not pair.rejected:
        return (pair,)
    return tuple(replace(pair, turns=turns, rejected=()) for turns in (pair.turns, pair.rejected))


def example(pair: Row, chosen: Example | Problem, rejected: Example | Problem) -> Example | Problem:
    """The prompt and the chosen answer (`source` tokens), then the rejected one. For an encoder-decoder too, whose
    encoder gets the prompt."""
    from finetune_trainer.rows import Problem

    if isinstance(chosen, Problem):
        return chosen
    if isinstance(rejected, Problem):
        return replace(rejected, message=f"rejected: {rejected.message}")
    both = min(len(chosen.ids), len(rejected.ids))
    same = next((at for at in range(both) if chosen.ids[at] != rejected.ids[at]), both)
    if same == both:
        return Problem(pair.number, "chosen and rejected are the same, as far as dataset.maxSequenceLength reaches")
    if not chosen.learnt[same] or not rejected.learnt[same]:
        return Problem(pair.number, "chosen and rejected differ before the answer begins")
    prompt = next((at for at in range(same, 0, -1) if not chosen.learnt[at - 1]), 0)
    return replace(
        chosen,
        ids=chosen.ids + rejected.ids[prompt:],
        learnt=(False,) * prompt + chosen.learnt[prompt:] + rejected.learnt[prompt:],
        source=len(chosen.ids),
    )
