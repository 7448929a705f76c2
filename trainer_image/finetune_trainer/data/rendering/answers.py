"""Finds each answer in the rendered text of a dialogue, and what a model is given before it.

What comes before an answer is always the prompt of inference. Answers that are rendered one after
the other in one text share an example. An answer that the template renders differently once others
follow, because it drops its reasoning or the end of the text, begins an example of its own.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune_trainer.data.reading import findings, reasoning
from finetune_trainer.data.reading.row import Row, Turn, short_repr
from finetune_trainer.data.rendering.chat_template import ChatTemplate

INSEPARABLE = (
    "renders a prompt alone differently from the same prompt with its answer, so the answer can't be separated from "
    "the prompt"
)
Texts = list[tuple[str, str]]
"""(the text before an answer, the answer) for each answer of an example; a document has no text
before it."""
_PROBE = "The answer of a probe."
_SHOWN = 30


class Inseparable(Exception):
    """Reports that a template renders a prompt alone differently from a prompt with its answer."""


@dataclass(frozen=True)
class Piece:
    """Holds the prompt of an answer, and the answer that follows it. `turn` is its index."""

    turn: int
    before: str
    answer: str


def examples(template: ChatTemplate, row: Row, indices: Sequence[int], stops: Sequence[str]) -> list[list[Piece]]:
    """Return the answers at the indices of a row's turns, as pieces of each example.

    The pieces of an example follow one another: the prompt of one begins with the text up to and
    including the answer before it. `stops` are the texts that end an answer. Answers that can't be
    separated from their prompts are left out. Raises Inseparable if that is true of all of them.
    """
    parts: list[list[Piece]] = []
    failure: Inseparable | None = None
    for index in indices:
        try:
            piece = _piece(template, row, index)
        except Inseparable as inseparable:
            failure = inseparable
            continue
        last = _joined(parts[-1][-1], piece, stops) if parts else None
        if last is None:
            parts.append([piece])
        else:
            parts[-1][-1:] = [last, piece]
    if failure is not None and not parts:
        raise failure
    return parts


def texts(pieces: Sequence[Piece], row: Row, *, masked: bool) -> Texts:
    """Return the text before each answer, from the answer before it, and the answer.

    With `masked`, the reasoning of an answer counts as text before it.
    """
    pairs: Texts = []
    end = 0
    for piece in pieces:
        hidden = reasoning.length(row.turns[piece.turn], piece.answer) if masked else 0
        pairs.append((piece.before[end:] + piece.answer[:hidden], piece.answer[hidden:]))
        end = len(piece.before) + len(piece.answer)
    return pairs


def with_texts(row: Row) -> Row:
    """Return a row with the texts from which calls were read instead of the calls, for a template
    that can't write calls. It is the row itself if there are no such texts."""
    if not any(turn.as_text for turn in row.turns):
        return row
    return replace(row, turns=tuple(_with_text(turn) if turn.as_text else turn for turn in row.turns))


def _with_text(turn: Turn) -> Turn:
    more = {key: value for key, value in json.loads(turn.more or "{}").items() if key != "tool_calls"}
    text = json.dumps(more, ensure_ascii=False, separators=(",", ":")) if more else ""
    return replace(turn, content=turn.as_text, more=text)


def missing_instruction(row: Row, parts: Sequence[Sequence[Piece]]) -> str:
    """Return what a template does to a system turn after the first one, in words that follow "the
    template"; empty if it writes all of them.

    `parts` are the rendered answers of each example.
    """
    for turn in row.turns[1:]:
        if turn.role == "system" and not any(findings.has_text(part[-1].before, turn.content) for part in parts):
            return (
                f"leaves out the system turn {short_repr(turn.content)}, which isn't the first turn; remove it, or set "
                "dataset.chatTemplate to a template that writes it"
            )
    return ""


def _piece(template: ChatTemplate, row: Row, index: int) -> Piece:
    """Render the prompt of an answer as at inference, and the answer."""
    before = template.render(row.turns[:index], row, answer=True)
    full = template.render(row.turns[: index + 1], row)
    if full.startswith(before):
        return Piece(index, before, full[len(before) :])
    answer = reasoning.continued(before, full, row.turns[index])
    if answer is None and any(turn.more or reasoning.of(turn) for turn in row.turns[:index]):
        answer = _after_other_turns(template, row, index)
    if answer is None:
        raise Inseparable(f"the chat template {INSEPARABLE}: {_parting(before, full)}")
    return Piece(index, before, answer)


def _after_other_turns(template: ChatTemplate, row: Row, index: int) -> str | None:
    """Return an answer before which the template renders calls and reasoning differently, or None.

    It begins after the text that begins an answer at inference. That text may occur several times,
    so the same turns with another answer have to have it in the same place.
    """
    before = template.render(row.turns[:index], row, answer=True)
    full = template.render(row.turns[: index + 1], row)
    earlier = template.render(row.turns[:index], row)
    beginning = before[len(earlier) :] if before.startswith(earlier) else ""
    other = template.render((*row.turns[:index], Turn("assistant", _PROBE)), row)
    common = posixpath.commonprefix([full, other])
    place = common.rfind(beginning)
    if not beginning.strip() or place < 0 or place != other.rfind(beginning, 0, other.find(_PROBE)):
        return None
    return full[place + len(beginning) :]


def _joined(last: Piece, following: Piece, stops: Sequence[str]) -> Piece | None:
    """Return the piece before `following` if they can share an example, else None.

    What comes after the stop token of an answer isn't trained on, so it may be missing in the
    prompt that follows. An answer without a stop token has to end its example, which adds one.
    """
    ends = [last.answer.find(stop) + len(stop) for stop in stops if stop in last.answer]
    if not ends:
        return None
    if following.before.startswith(last.before + last.answer):
        return last
    cut = Piece(last.turn, last.before, last.answer[: min(ends)])
    return cut if following.before.startswith(cut.before + cut.answer) else None


def _parting(before: str, full: str) -> str:
    """Say where a prompt and the same prompt with its answer part."""
    end = len(posixpath.commonprefix([before, full]))
    common, alone, answered = (text for text in (before[:end][-_SHOWN:], before[end:][:_SHOWN], full[end:][:_SHOWN]))
    return f"after {common!r} it writes {alone!r} without the answer and {answered!r} with it"
