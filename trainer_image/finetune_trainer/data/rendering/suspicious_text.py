"""Finds texts of a row that look as if they weren't only text: control tokens, turns that were
rendered already, and blanks that a chat template keeps.

It counts them; whether a row may have them is decided by the job.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from finetune_trainer.data.reading.findings import SUBJECTS
from finetune_trainer.data.reading.row import Omission, Row

_FRAMES = (
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|assistant|>", "<|start|>", "[INST]",
    "### Instruction:", "### Response:", "\n\nHuman:", "\n\nAssistant:", "<｜User｜>", "<｜Assistant｜>",
)  # fmt: skip

_FURTHER = "tool calls or reasoning"
_TAGS = (("<tools>", "system"), ("<tool_response>", "tool"))
"""Tags that templates write, each with the role of the turns that they are around."""


class ControlTokens:
    """Finds control tokens of a tokenizer inside texts. `all` are they, the longest first."""

    def __init__(self, tokenizer: Any) -> None:
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        # A word such as "unk" could be meant as a word.
        tokens = sorted({t for t in (*tokenizer.all_special_tokens, *added) if not t.isalnum()}, key=len, reverse=True)
        self.all = tuple(tokens)
        self._beginnings = tuple({token[:2] for token in tokens})
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def within(self, text: str) -> list[str]:
        """Return the control tokens inside a text, each of them once."""
        if self._pattern is None or not any(beginning in text for beginning in self._beginnings):
            return []
        return sorted(set(self._pattern.findall(text)))

    def omissions(self, row: Row) -> list[Omission]:
        """Return the control tokens inside the texts of a row."""
        return [("ControlTokens", f"{token} in {subject}", 1) for subject, token in self._of(row)]

    def refusal(self, row: Row) -> str:
        """Return why a row that must not have control tokens can't be used, or an empty string."""
        subject, token = next(self._of(row), ("", ""))
        return (
            f"its {subject} contain the control token {token!r}; remove it, or set dataset.rendering.controlTokens: "
            "encode to train on it as text"
            if token
            else ""
        )

    def _of(self, row: Row) -> Iterator[tuple[str, str]]:
        for turn in row.turns:
            yield from ((SUBJECTS[turn.role], token) for token in self.within(turn.content))
            if turn.more:
                yield from ((_FURTHER, token) for token in self.within(turn.more))
        if row.tools:
            yield from (("tools", token) for token in self.within(row.tools))


def frames(row: Row) -> Iterator[Omission]:
    """Yield the questions that hold turns which were rendered already."""
    for turn in row.turns:
        if turn.role == "user":
            frame = next((frame for frame in _FRAMES if frame in turn.content), None)
            if frame is not None:
                yield "RenderedTwice", f"{SUBJECTS['user']} with {frame.strip()}", 1


def blanks(row: Row, answers: Sequence[str]) -> list[Omission]:
    """Return the answers whose blanks at the beginning or the end the template keeps.

    `answers` are their rendered texts.
    """
    count = 0
    for turn in row.turns:
        content = turn.content
        if turn.role == "assistant" and turn.in_loss and content and (content[0].isspace() or content[-1].isspace()):
            count += any(content in answer for answer in answers)
    return [("Blanks", "answers", count)] if count else []


def calls(row: Row, pairs: Sequence[tuple[str, str]]) -> Iterator[Omission]:
    """Yield the calls that are rendered as the texts that the row has, and the turns with tags that
    the chat template writes as well.

    `pairs` are the texts of the row's last example.
    """
    as_text = sum(bool(turn.as_text) and turn.content == turn.as_text for turn in row.turns)
    if as_text:
        yield "CallsAsText", "calls", as_text
    for tag, role in _TAGS:
        tagged = sum(turn.role == role and tag in turn.content for turn in row.turns)
        if tagged and _count(tag, pairs) > sum(turn.content.count(tag) for turn in row.turns):
            yield "TagsTwice", f"{SUBJECTS[role]} with {tag}", tagged


def _count(tag: str, pairs: Sequence[tuple[str, str]]) -> int:
    return sum(text.count(tag) for pair in pairs for text in pair)


def stop_token(row: Row, stops: Sequence[str]) -> str:
    """Return why a row whose answers contain a stop token can't be used, or an empty string."""
    answers = [turn for turn in row.turns if turn.role == "assistant" and turn.in_loss]
    stop = next((text for turn in answers for text in stops if text in turn.content or text in turn.more), None)
    if stop is None:
        return ""
    remedy = "remove it, or set dataset.rendering.controlTokens: encode"
    return f"an answer contains the stop token {stop!r}, which would end it; {remedy}"
