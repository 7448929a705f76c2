"""Turns a row into tokens and marks what is learnt: text → ids, labels. No torch; deterministic.

Called by `examples`. The prompt is masked by construction: what a model gets to see at inference (the rendered
prompt, tokenised alone) is the prompt, what follows up to the stop token is learnt. No string is ever searched for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer import pairs, tokenizer_files
from finetune_trainer.failure import Failed
from finetune_trainer.rows import Problem, Row


@dataclass(frozen=True)
class Example:
    """`learnt[i]` is true where token i is predicted and counted in the loss; it never is for the first token.

    For an encoder-decoder the first `source` tokens go to the encoder and the rest to the decoder.
    """

    number: int
    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    source: int = 0
    whole: int = 0  # tokens before it was cut


Texts = list[tuple[str, str]]
"""(what comes before, the answer) of each answer of a row; a text has nothing before it."""


class Renderer:
    """Renders rows for one tokenizer. `rule` says how, for people."""

    def __init__(
        self, tokenizer: Any, stops: frozenset[int], *, max_length: int, encoder_decoder: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._stop = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops)
        self._max_length = max_length
        self._encoder_decoder = encoder_decoder
        self._chat = bool(tokenizer.chat_template) and not encoder_decoder
        self._stop_texts = tuple(str(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stops))
        added = list(tokenizer("").input_ids)
        self._first = [tokenizer.bos_token_id] if added[:1] == [tokenizer.bos_token_id] else []

    @classmethod
    def load(cls, folder: Path, max_length: int, template: str | None = None, added: tuple[str, ...] = ()) -> Renderer:
        """`template` is dataset.chatTemplate: a Jinja text or the name of a file in the folder."""
        tokenizer = tokenizer_files.load(folder, added)
        given = tokenizer_files.chat_template(folder, template)
        if given is not None:
            tokenizer.chat_template = given
        return cls(
            tokenizer,
            tokenizer_files.stop_tokens(tokenizer, folder),
            max_length=max_length,
            encoder_decoder=tokenizer_files.is_encoder_decoder(folder),
        )

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def encoder_decoder(self) -> bool:
        return self._encoder_decoder

    @property
    def stops(self) -> frozenset[int]:
        return self._stops

    @property
    def rule(self) -> tuple[str, str]:
        """(choice, reason)"""
        if self._encoder_decoder:
            return "encoder-decoder", "the prompt goes to the encoder, the completion and an end token to the decoder"
        if self._chat:
            return (
                "chat template",
                "the tokenizer has one, so prompt and completion become user and assistant turns",
            )
        return "plain text", "the tokenizer has no chat template: prompt, completion and an end token, nothing between"

    @property
    def chat(self) -> bool:
        """Whether turns go through a chat template."""
        return self._chat

    @property
    def beginning(self) -> tuple[int, ...]:
        """The token that the tokenizer puts before any text, if it does."""
        return tuple(self._first)

    def render(self, row: Row) -> Example | Problem:
        """The row's tokens, cut to the longest length, or why nothing is left to learn."""
        return self._rendered([row], self._max_length)[0]

    def render_all(self, rows: Sequence[Row]) -> list[Example | Problem]:
        """As `render`, but tokenized together: on all cores, and a call costs more than a short text."""
        return self._rendered(rows, self._max_length)

    def whole(self, row: Row) -> Example | Problem:
        """As `render`, however long it is."""
        return self._rendered([row], sys.maxsize)[0]

    def _rendered(self, rows: Sequence[Row], most: int) -> list[Example | Problem]:
        sides = [side for row in rows for side in pairs.sides(row)]
        texts = [self._texts(side) for side in sides]
        known = self._tokenized(pair for one in texts if not isinstance(one, Problem) for pair in one)
        done = (
            one if isinstance(one, Problem) else self._example(side, one, known, most)
            for side, one in zip(sides, texts, strict=True)
        )
        return [pairs.example(row, next(done), next(done)) if row.rejected else next(done) for row in rows]

    def _texts(self, row: Row) -> Texts | Problem:
        if row.is_text and self._encoder_decoder:
            return Problem(row.number, "a text has no prompt for the encoder; give prompt and completion")
        if not self._chat and not row.plain:
            return Problem(
                row.number,
                "messages need a chat template, which this tokenizer doesn't have; give one in dataset.chatTemplate",
            )
        if row.is_text:
            return [("", row.turns[0].content)]
        for turn in row.turns:
            held = next((text for text in self._stop_texts if text in turn.content), None)
            if held is not None and turn.role == "assistant" and turn.learnt:
                return Problem(row.number, f"an answer holds the text {held!r}, which would end it there; take it out")
        if not self._chat:
            return [(row.bare or row.turns[0].content, row.turns[1].content)]
        try:
            return self._answers(row)
        except TemplateRefusal as refusal:
            return Problem(row.number, f"the chat template refuses it: {refusal}")

    def _tokenized(self, texts: Iterable[tuple[str, str]]) -> dict[str, list[int]]:
        """Each text that the pairs are made of, once."""
        wanted: dict[str, None] = {}
        for before, answer in texts:
            wanted |= dict.fromkeys((answer,) if self._encoder_decoder else (before, before + answer))
        wanted.pop("", None)
        ids = self._tokenizer(list(wanted), add_special_tokens=False).input_ids if wanted else ()
        return {"": [], **dict(zip(wanted, ids, strict=True))}

    def _example(self, row: Row, texts: Texts, known: dict[str, list[int]], most: int) -> Example | Problem:
        pieces = self._pieces(row, texts, known)
        ids = [token for piece, _ in pieces for token in piece]
        learnt = [flag for piece, flag in pieces for _ in piece]
        source = len(pieces[0][0]) if self._encoder_decoder else 0
        if self._encoder_decoder and source == 0:
            return Problem(row.number, "the prompt is empty, and an encoder needs at least one token")
        learnt[0] = False  # nothing comes before it that could predict it
        if not any(learnt):
            return Problem(row.number, "rendered, it holds no token that could be learnt")
        if not any(learnt[:most]):
            first = learnt.index(True)
            return Problem(
                row.number,
                f"the prompt has {first} tokens, so of dataset.maxSequenceLength {most} none is left to learn",
            )
        return Example(row.number, tuple(ids[:most]), tuple(learnt[:most]), source, len(ids))

    def prompt(self, row: Row) -> list[int]:
        """What generation starts from: everything before the last answer, as at inference."""
        if self._encoder_decoder:
            return self._source(row.bare or row.turns[0].content)
        if not self._chat:
            return self._first_once(self._ids(row.bare or row.turns[0].content))
        return self._ids(self._template(row, len(row.turns) - 1, answer=True))

    def _pieces(self, row: Row, texts: Texts, known: dict[str, list[int]]) -> list[tuple[list[int], bool]]:
        if row.is_text:
            ids = self._first_once(known[texts[0][1]])
            return [(ids if ids[-1:] == [self._stop] else [*ids, self._stop], True)]
        if self._chat:
            return self._turns(texts, known)
        ((prompt, completion),) = texts
        if self._encoder_decoder:
            return [(self._source(prompt), False), ([*known[completion], self._stop], True)]
        before, answer = self._split(prompt, prompt + completion, known)
        return [(self._first_once(before), False), ([*answer, self._stop], True)]

    def _turns(self, texts: Texts, known: dict[str, list[int]]) -> list[tuple[list[int], bool]]:
        """Alternating prompt and answer pieces; every answer ends with a stop token, the last one at the very end."""
        rendered: list[tuple[list[int], bool]] = []
        for before, answer in texts:
            prompt_ids, answer_ids = self._split(before, before + answer, known)
            stop = next((i for i, token in enumerate(answer_ids) if token in self._stops), len(answer_ids) - 1)
            rendered += [(prompt_ids, False), (answer_ids[: stop + 1], True), (answer_ids[stop + 1 :], False)]
        last = rendered[-2][0]
        if not last or last[-1] not in self._stops:  # the template ends no turn; without this an answer would never end
            last.append(self._stop)
        return rendered[:-1]  # nothing follows the last stop token

    def _answers(self, row: Row) -> Texts:
        answers = [index for index, turn in enumerate(row.turns) if turn.role == "assistant" and turn.learnt]
        # Some templates render an earlier answer differently once another follows (they drop its reasoning): then
        # the last answer alone is learnt, seen after exactly what inference would show.
        texts = self._prefixes(row, answers) or self._prefixes(row, answers[-1:])
        if texts is None:
            raise Failed(
                "ModelInvalid",
                "model.uri: the chat template renders a prompt alone differently from the same prompt with its answer, "
                "so what is learnt can't be told apart; mend chat_template, or give one in dataset.chatTemplate",
            )
        return texts

    def _prefixes(self, row: Row, answers: list[int]) -> Texts | None:
        """None where one rendering is no prefix of the next."""
        texts: Texts = []
        done = ""
        for index in answers:
            before = self._template(row, index, answer=True)
            whole = self._template(row, index + 1)
            if not before.startswith(done) or not whole.startswith(before):
                return None
            texts.append((before[len(done) :], whole[len(before) :]))
            done = whole
        return texts

    def _template(self, row: Row, end: int, *, answer: bool = False) -> str:
        """The first `end` turns, and with `answer` what begins the next one."""
        chat = [
            {"role": turn.role, "content": turn.content, **(json.loads(turn.more) if turn.more else {})}
            for turn in row.turns[:end]
        ]
        tools = json.loads(row.tools) if row.tools else None
        apply = self._tokenizer.apply_chat_template
        try:
            return str(apply(chat, tools=tools, tokenize=False, add_generation_prompt=answer))
        except (ValueError, KeyError) as error:  # transformers' own: no such template for tools
            raise TemplateRefusal(error) from None
        except Exception as error:  # a template is a program: it may raise anything
            raise TemplateRefusal(f"{type(error).__name__}: {error}" if not _says_why(error) else error) from None

    def _split(self, before: str, whole: str, known: dict[str, list[int]]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt exactly as at inference, and those that follow it."""
        prompt, both = known[before], known[whole]
        if both[: len(prompt)] == prompt:
            return prompt, both[len(prompt) :]
        return prompt, self._ids(whole[len(before) :])  # a token would reach over the border

    def _source(self, prompt: str) -> list[int]:
        return list(self._tokenizer(prompt).input_ids)

    def _first_once(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._first)] == self._first else [*self._first, *ids]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids) if text else []


class TemplateRefusal(Exception):
    """A chat template's own raise_exception, such as roles that must alternate."""


def _says_why(error: Exception) -> bool:
    """Whether it is the template's own raise_exception, whose words are meant for people."""
    from jinja2.exceptions import TemplateError

    return isinstance(error, TemplateError)
