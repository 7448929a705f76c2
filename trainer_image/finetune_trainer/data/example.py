"""Defines an example: the tokens of a row, and which of them count in the loss.

The example of a preference pair has both of its answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile

from finetune_trainer.data.reading.row import Omission, Problem, Row, union

_OF_ONE_ANSWER = ("AnswersNotTrained", "AnswersApart")
"""Reasons of omissions that don't apply to a pair, which compares only what differs."""


@dataclass(frozen=True)
class Example:
    """Holds the tokens of a row.

    `loss_mask[i]` is true if token i is predicted and counts in the loss, which never holds for the
    first token. For an encoder-decoder the first `source` tokens go to the encoder and the rest to
    the decoder.
    """

    number: int
    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    source: int = 0
    uncut_length: int = 0  # tokens before the example was truncated
    omissions: tuple[Omission, ...] = ()  # what the chat template leaves out
    earlier: tuple[Example, ...] = ()  # of earlier answers, if they are rendered differently once others follow


def of_pair(pair: Row, chosen: Example | Problem, rejected: Example | Problem) -> Example | Problem:
    """Join both sides of a pair: the prompt and the chosen answer (`source` tokens), then the
    rejected answer.

    This holds for an encoder-decoder too, whose encoder gets the prompt. Returns a Problem if a
    side has one, or if the sides don't differ in their answers.
    """
    if isinstance(chosen, Problem):
        return chosen
    if isinstance(rejected, Problem):
        return replace(rejected, message=f"rejected: {rejected.message}")
    shorter = min(len(chosen.ids), len(rejected.ids))
    common = next((index for index in range(shorter) if chosen.ids[index] != rejected.ids[index]), shorter)
    if common == shorter:
        within = "" if pair.turns == pair.rejected else " within dataset.maxSequenceLength"
        return Problem(pair.number, f"chosen and rejected are the same{within}; remove the row")
    if not chosen.loss_mask[common] or not rejected.loss_mask[common]:
        return Problem(
            pair.number,
            "chosen and rejected differ before the last answer that the chat template renders with them begins; give a "
            "row for each answer, with the same turns before it",
        )
    omissions = [omission for omission in chosen.omissions if omission[0] not in _OF_ONE_ANSWER]
    same = takewhile(lambda sides: sides[0] == sides[1], zip(pair.turns, pair.rejected, strict=False))
    shared = sum(turn.role == "assistant" and turn.in_loss for turn, _ in same)
    omissions += [("AnswersShared", "answers", shared)] if shared else []
    prompt = next((index for index in range(common, 0, -1) if not chosen.loss_mask[index - 1]), 0)
    return replace(
        chosen,
        ids=chosen.ids + rejected.ids[prompt:],
        loss_mask=(False,) * prompt + chosen.loss_mask[prompt:] + rejected.loss_mask[prompt:],
        source=len(chosen.ids),
        omissions=tuple(union(omissions, (o for o in rejected.omissions if o[0] not in _OF_ONE_ANSWER))),
    )
