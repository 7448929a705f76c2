"""Renders a row into tokens, and marks those that count in the loss.

The prompt is masked by construction: the prompt is what a model gets at inference (the rendered
prompt, tokenized separately), and what follows it up to the stop token counts in the loss. No
string is ever searched for. Rendering is deterministic, and the module doesn't import torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune_trainer import limits
from finetune_trainer.data import example
from finetune_trainer.data import tokenizer as tokenizer_files
from finetune_trainer.data.example import Example
from finetune_trainer.data.reading import findings, preference_rows
from finetune_trainer.data.reading.row import Problem, Row

INSEPARABLE = (
    "renders a prompt alone differently from the same prompt with its answer, so the answer can't be separated from "
    "the prompt"
)
TEMPLATE_SECONDS = 5.0
"""How long a template, which is a program, may take for one text."""
Texts = list[tuple[str, str]]
"""(the text before an answer, the answer) for each answer; a document has no text before it."""


class Renderer:
    """Renders rows for one tokenizer."""

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
        """Load the tokenizer of a model's folder.

        `template` is dataset.chatTemplate: a Jinja text or the name of a file in the folder.
        `added` are the tokens that the job adds.
        """
        tokenizer = tokenizer_files.load(folder, added)
        text = tokenizer_files.chat_template(folder, template)
        if text is not None:
            tokenizer.chat_template = text
        return cls(
            tokenizer,
            tokenizer_files.stop_tokens(tokenizer, folder),
            max_length=max_length,
            encoder_decoder=tokenizer_files.is_encoder_decoder(folder),
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of Transformers."""
        return self._tokenizer

    @property
    def max_length(self) -> int:
        """The length in tokens to which an example is truncated."""
        return self._max_length

    @property
    def encoder_decoder(self) -> bool:
        """Whether the prompt goes to an encoder."""
        return self._encoder_decoder

    @property
    def stops(self) -> frozenset[int]:
        """The ids of the tokens that end an answer."""
        return self._stops

    @property
    def rule(self) -> tuple[str, str]:
        """How rows are rendered, as (choice, reason)."""
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
        """Return a row's tokens, truncated to `max_length`, or why the row can't be used."""
        return self._rendered([row], self._max_length)[0]

    def render_all(self, rows: Sequence[Row]) -> list[Example | Problem]:
        """Render rows together.

        That uses all cores, and avoids a call for each short text.
        """
        return self._rendered(rows, self._max_length)

    def render_uncut(self, row: Row) -> Example | Problem:
        """Render a row without truncating it."""
        return self._rendered([row], sys.maxsize)[0]

    def prompt(self, row: Row) -> list[int]:
        """Return the tokens from which generation starts.

        They are everything before the last answer, as at inference.
        """
        if self._encoder_decoder:
            return self._source(row.plain_prompt or row.turns[0].content)
        if not self._chat:
            return self._with_beginning(self._ids(row.plain_prompt or row.turns[0].content))
        return self._ids(self._template(row, len(row.turns) - 1, answer=True))

    def _rendered(self, rows: Sequence[Row], max_length: int) -> list[Example | Problem]:
        sides = [side for row in rows for side in preference_rows.sides(row)]
        texts_of_sides = [self._texts(side) for side in sides]
        token_ids = self._tokenized(
            pair for texts in texts_of_sides if not isinstance(texts, Problem) for pair in texts
        )
        examples = (
            texts if isinstance(texts, Problem) else self._example(side, texts, token_ids, max_length)
            for side, texts in zip(sides, texts_of_sides, strict=True)
        )
        return [
            example.of_pair(row, next(examples), next(examples)) if row.rejected else next(examples) for row in rows
        ]

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
            stop = next((text for text in self._stop_texts if text in turn.content), None)
            if stop is not None and turn.role == "assistant" and turn.in_loss:
                return Problem(row.number, f"an answer contains the stop token {stop!r}, which would end it; remove it")
        if not self._chat:
            return [(row.plain_prompt or row.turns[0].content, row.turns[1].content)]
        try:
            return self._chat_texts(row)
        except TemplateRefusal as refusal:
            return Problem(row.number, f"the chat template refuses it: {refusal}")

    def _tokenized(self, pairs: Iterable[tuple[str, str]]) -> dict[str, list[int]]:
        """Tokenize each text that the pairs consist of once. Returns the ids by text."""
        texts: dict[str, None] = {}
        for before, answer in pairs:
            texts |= dict.fromkeys((answer,) if self._encoder_decoder else (before, before + answer))
        texts.pop("", None)
        ids = tokenizer_files.encode(self._tokenizer, list(texts)) if texts else []
        return {"": [], **dict(zip(texts, ids, strict=True))}

    def _example(self, row: Row, texts: Texts, token_ids: dict[str, list[int]], max_length: int) -> Example | Problem:
        segments = self._segments(row, texts, token_ids)
        ids = [token for segment, _ in segments for token in segment]
        loss_mask = [in_loss for segment, in_loss in segments for _ in segment]
        source = len(segments[0][0]) if self._encoder_decoder else 0
        if self._encoder_decoder and source == 0:
            return Problem(row.number, "the prompt is empty, and an encoder needs at least one token")
        loss_mask[0] = False  # nothing comes before it that could predict it
        if not any(loss_mask):
            return Problem(row.number, "its rendered text has no token to train on")
        if not any(loss_mask[:max_length]):
            return Problem(
                row.number,
                f"the prompt has {loss_mask.index(True)} tokens, so dataset.maxSequenceLength {max_length} leaves "
                "nothing to train on",
            )
        omissions = findings.omitted(row, texts) if self._chat and not row.is_text else ()
        return Example(row.number, tuple(ids[:max_length]), tuple(loss_mask[:max_length]), source, len(ids), omissions)

    def _segments(self, row: Row, texts: Texts, token_ids: dict[str, list[int]]) -> list[tuple[list[int], bool]]:
        """Split a row into runs of tokens, each with whether it counts in the loss."""
        if row.is_text:
            ids = self._with_beginning(token_ids[texts[0][1]])
            return [(ids if ids[-1:] == [self._stop] else [*ids, self._stop], True)]
        if self._chat:
            return self._turns(texts, token_ids)
        ((prompt, completion),) = texts
        if self._encoder_decoder:
            return [(self._source(prompt), False), ([*token_ids[completion], self._stop], True)]
        before, answer = self._split(prompt, prompt + completion, token_ids)
        return [(self._with_beginning(before), False), ([*answer, self._stop], True)]

    def _turns(self, texts: Texts, token_ids: dict[str, list[int]]) -> list[tuple[list[int], bool]]:
        """Alternate prompts and answers.

        Every answer ends with a stop token, and the last one ends the row.
        """
        segments: list[tuple[list[int], bool]] = []
        for before, answer in texts:
            prompt_ids, answer_ids = self._split(before, before + answer, token_ids)
            stop = next((i for i, token in enumerate(answer_ids) if token in self._stops), len(answer_ids) - 1)
            segments += [(prompt_ids, False), (answer_ids[: stop + 1], True), (answer_ids[stop + 1 :], False)]
        last = segments[-2][0]
        if not last or last[-1] not in self._stops:  # the template ends no turn; without this an answer would never end
            last.append(self._stop)
        return segments[:-1]  # nothing follows the last stop token

    def _chat_texts(self, row: Row) -> Texts | Problem:
        answers = [index for index, turn in enumerate(row.turns) if turn.role == "assistant" and turn.in_loss]
        # Some templates render an earlier answer differently once another one follows (they drop
        # its reasoning). Then only the last answer counts in the loss, after exactly the text that
        # inference would show.
        texts = self._texts_of_answers(row, answers) or self._texts_of_answers(row, answers[-1:])
        if texts is None:
            return Problem(row.number, f"the chat template {INSEPARABLE}; fix it, or set dataset.chatTemplate")
        for index, (_, answer) in zip(answers[-len(texts) :], texts, strict=True):
            if problem := findings.changed_answer(row.turns[index], answer):
                return Problem(row.number, f"the chat template {problem}")
        return texts

    def _texts_of_answers(self, row: Row, answers: list[int]) -> Texts | None:
        """Render the text before each of `answers` and the answer.

        Returns None if one rendering isn't a prefix of the next one.
        """
        texts: Texts = []
        previous = ""
        for index in answers:
            before = self._template(row, index, answer=True)
            full = self._template(row, index + 1)
            if not before.startswith(previous) or not full.startswith(before):
                return None
            texts.append((before[len(previous) :], full[len(before) :]))
            previous = full
        return texts

    def _template(self, row: Row, end: int, *, answer: bool = False) -> str:
        """Render the first `end` turns and, with `answer`, what begins the next one."""
        chat = [
            {"role": turn.role, "content": turn.content, **(json.loads(turn.more) if turn.more else {})}
            for turn in row.turns[:end]
        ]
        tools = json.loads(row.tools) if row.tools else None
        apply = self._tokenizer.apply_chat_template
        try:
            with limits.seconds_at_most(TEMPLATE_SECONDS):
                return str(apply(chat, tools=tools, tokenize=False, add_generation_prompt=answer))
        except limits.Overrun as overrun:
            raise TemplateRefusal(overrun) from None
        except (ValueError, KeyError) as error:  # of Transformers itself: there is no template for tools
            raise TemplateRefusal(error) from None
        except Exception as error:  # a template is a program, so it may raise anything
            message = error if _is_template_error(error) else f"{type(error).__name__}: {error}"
            raise TemplateRefusal(message) from None

    def _split(self, before: str, full: str, token_ids: dict[str, list[int]]) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt exactly as at inference, and those that follow it."""
        prompt, both = token_ids[before], token_ids[full]
        if both[: len(prompt)] == prompt:
            return prompt, both[len(prompt) :]
        return prompt, self._ids(full[len(before) :])  # a token would extend over the border

    def _source(self, prompt: str) -> list[int]:
        return list(self._tokenizer(prompt).input_ids)

    def _with_beginning(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._first)] == self._first else [*self._first, *ids]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids) if text else []


class TemplateRefusal(Exception):
    """Reports that a chat template refuses a row, for example because roles must alternate."""


def _is_template_error(error: Exception) -> bool:
    """Whether the template itself raised the error, so that its message is meant for people."""
    from jinja2.exceptions import TemplateError

    return isinstance(error, TemplateError)
