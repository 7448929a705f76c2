"""Checks and adjusts the turns of a dialogue as the job wants them, whatever format they come from.

A ValueError says what is wrong. The module is pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from finetune_api.spec.rendering import RenderingSpec
from finetune_trainer.data.reading import reasoning
from finetune_trainer.data.reading.row import Omission, Row, Turn, is_blank, union


def adjusted(row: Row, rendering: RenderingSpec) -> Row:
    """Return a row as the job trains on it, with what it loses in `unread`. Raises ValueError."""
    if row.is_text:
        return row
    turns, lost = _adjusted(row.turns, rendering)
    rejected: tuple[Turn, ...] = ()
    if row.rejected:
        try:
            rejected, lost_of_rejected = _adjusted(row.rejected, rendering)
            lost = union(lost, lost_of_rejected)
        except ValueError as error:
            raise ValueError(f"rejected: {error}") from None
    if turns is row.turns and rejected is row.rejected and not lost:
        return row
    return replace(row, turns=turns, rejected=rejected, unread=(*row.unread, *lost))


def _adjusted(turns: tuple[Turn, ...], rendering: RenderingSpec) -> tuple[tuple[Turn, ...], list[Omission]]:
    lost: list[Omission] = []
    if rendering.open_turns == "cut":
        turns, count = _without_open_turns(turns)
        lost += [("TurnsCut", "turns", count)] if count else []
    if rendering.reasoning == "remove":
        turns = tuple(reasoning.removed(turn) if turn.role == "assistant" else turn for turn in turns)
    if rendering.whitespace == "strip":
        turns = tuple(replace(turn, content=turn.content.strip()) for turn in turns)
    _check(turns)
    questions = sum(turn.role == "user" and is_blank(turn.content) and not turn.more for turn in turns)
    lost += [("EmptyQuestions", "questions", questions)] if questions else []
    empty = [index for index, turn in enumerate(turns) if _is_empty_answer(turn)]
    if empty:
        lost.append(("EmptyAnswers", "answers", len(empty)))
        turns = tuple(replace(t, in_loss=False) if index in empty else t for index, t in enumerate(turns))
    lost += _unfinished(turns)
    broken = sum("\ufffd" in turn.content for turn in turns)
    lost += [("BrokenText", "texts", broken)] if broken else []
    if not any(turn.in_loss for turn in turns if turn.role == "assistant"):
        raise ValueError("every assistant turn has weight 0 or no text, so there is nothing to train on")
    return turns, lost


def _unfinished(turns: tuple[Turn, ...]) -> Iterator[Omission]:
    """Yield the answers whose reasoning doesn't end, or has no answer after it."""
    faults = [reasoning.fault(turn) for turn in turns if turn.role == "assistant" and turn.in_loss]
    yield from ((reason, "answers", faults.count(reason)) for reason in sorted(set(faults)) if reason)


def _check(turns: tuple[Turn, ...]) -> None:
    """Refuse turns that aren't questions and answers. Raises ValueError."""
    last = turns[-1] if turns else None
    cut = "set dataset.rendering.openTurns: cut to remove such turns"
    if last is None or last.role != "assistant":
        role = last.role if last else "none"
        raise ValueError(f"the last turn's role is {role!r}; it must be 'assistant', the answer to train on; {cut}")
    if turns[0].role == "assistant":
        raise ValueError(f"the first turn's role is 'assistant'; there is nothing to answer; {cut}")
    if is_blank(last.content) and not last.more:
        raise ValueError("the last turn's content is empty")


def _without_open_turns(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], int]:
    """Return turns without a greeting before the first question, and without what follows the last
    answer, and how many were removed."""
    system = turns[:1] if turns and turns[0].role == "system" else ()
    rest = turns[len(system) :]
    begin = next((index for index, turn in enumerate(rest) if turn.role != "assistant"), len(rest))
    answers = [index for index, turn in enumerate(rest) if turn.role == "assistant"]
    remaining = rest[begin : answers[-1] + 1] if answers else ()
    return (*system, *remaining), len(rest) - len(remaining)


def _is_empty_answer(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.in_loss and not turn.more and is_blank(turn.content)
