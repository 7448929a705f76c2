"""Checks and adjusts the turns of a dialogue as the job wants them, whatever format they come from.

A ValueError says what is wrong. The module is pure.
"""

from __future__ import annotations

from dataclasses import replace

from finetune_api.spec.rendering import RenderingSpec
from finetune_trainer.data.reading import reasoning
from finetune_trainer.data.reading.row import Omission, Row, Turn, is_blank, union

_EMPTY_ANSWER = ("EmptyAnswers", "answers")


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
    faults = [fault for turn in turns if (fault := _fault(turn)) is not None]
    if faults:
        lost += [(*fault, faults.count(fault)) for fault in dict.fromkeys(faults)]
        turns = tuple(replace(turn, in_loss=False) if _fault(turn) == _EMPTY_ANSWER else turn for turn in turns)
    if not any(turn.in_loss for turn in turns if turn.role == "assistant"):
        raise ValueError("every assistant turn has weight 0 or no text, so there is nothing to train on")
    return turns, lost


def _fault(turn: Turn) -> tuple[str, str] | None:
    """Return what is wrong with the text of a turn, as (reason, subject) of an omission."""
    content = turn.content
    if "\ufffd" in content:
        return "BrokenText", "texts"
    if turn.role == "user":
        return ("EmptyQuestions", "questions") if not turn.more and is_blank(content) else None
    if turn.role != "assistant" or not turn.in_loss:
        return None
    if not turn.more and is_blank(content):
        return _EMPTY_ANSWER
    reason = reasoning.fault(turn)
    return (reason, "answers") if reason else None


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
