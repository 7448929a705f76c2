"""Renders a row into tokens, and marks those that count in the loss.

The prompt is masked by construction: the prompt is what a model gets at inference (the rendered
prompt, tokenized separately), and what follows it up to the stop token counts in the loss. No
string is ever searched for. Rendering is deterministic, and the module doesn't import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_api.spec.rendering import RenderingSpec
from finetune_trainer.data import example
from finetune_trainer.data import tokenizer as tokenizer_files
from finetune_trainer.data.example import Example
from finetune_trainer.data.reading import findings, preference_rows
from finetune_trainer.data.reading.row import Omission, Problem, Row
from finetune_trainer.data.rendering import answers, suspicious_text
from finetune_trainer.data.rendering.answers import Texts
from finetune_trainer.data.rendering.chat_template import ChatTemplate, TemplateRefusal
from finetune_trainer.data.rendering.encoder import Encoder
from finetune_trainer.data.rendering.suspicious_text import ControlTokens

_ROLES_SHOWN = 12


class Renderer:
    """Renders rows for one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        stops: frozenset[int],
        *,
        max_length: int,
        encoder_decoder: bool = False,
        rendering: RenderingSpec | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._stop = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops)
        self._max_length = max_length
        self._encoder_decoder = encoder_decoder
        self._chat = bool(tokenizer.chat_template) and not encoder_decoder
        self._stop_texts = tuple(str(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stops))
        self._rendering = rendering or RenderingSpec()
        self._chat_template = ChatTemplate(tokenizer, self._rendering.date)
        self._control_tokens = ControlTokens(tokenizer)
        literals = self._control_tokens.all if self._rendering.control_tokens == "encode" else ()
        self._encoder = Encoder(tokenizer, literals)

    @classmethod
    def load(
        cls,
        folder: Path,
        max_length: int,
        template: str | None = None,
        added: tuple[str, ...] = (),
        rendering: RenderingSpec | None = None,
    ) -> Renderer:
        """Load the tokenizer of a model's folder.

        `template` is dataset.chatTemplate: a Jinja text, the name of a file in the folder, or none.
        `added` are the tokens that the job adds.
        """
        tokenizer = tokenizer_files.load(folder, added)
        text = tokenizer_files.chat_template(folder, template)
        if text is not None:
            tokenizer.chat_template = text or None
        return cls(
            tokenizer,
            tokenizer_files.stop_tokens(tokenizer, folder),
            max_length=max_length,
            encoder_decoder=tokenizer_files.is_encoder_decoder(folder),
            rendering=rendering,
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
    def template(self) -> ChatTemplate:
        """The chat template of the tokenizer."""
        return self._chat_template

    @property
    def beginning(self) -> tuple[int, ...]:
        """The token that the tokenizer puts before any text, if it does."""
        return tuple(self._encoder.beginning)

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
        row = self._side(row, is_pair=False)[0] if any(t.as_text for t in row.turns) else self._encoder.prepared(row)
        if self._encoder_decoder:
            return self._encoder.source(row.plain_prompt or row.turns[0].content)
        if not self._chat:
            return self._encoder.with_beginning(self._encoder.ids(row.plain_prompt or row.turns[0].content))
        return self._encoder.ids(self._chat_template.render(row.turns[:-1], row, answer=True))

    def _rendered(self, rows: Sequence[Row], max_length: int) -> list[Example | Problem]:
        sides = [self._side(side, is_pair=bool(row.rejected)) for row in rows for side in preference_rows.sides(row)]
        token_ids = self._tokenized(
            pair for _, parts in sides if not isinstance(parts, Problem) for texts in parts for pair in texts
        )
        examples = (
            parts if isinstance(parts, Problem) else self._joined(side, parts, token_ids, max_length)
            for side, parts in sides
        )
        return [
            example.of_pair(row, next(examples), next(examples)) if row.rejected else next(examples) for row in rows
        ]

    def _side(self, row: Row, *, is_pair: bool) -> tuple[Row, list[Texts] | Problem]:
        """Return a row as it is rendered, with the texts of each example that it becomes."""
        try:
            prepared = self._encoder.prepared(row)
        except ValueError as error:
            return row, Problem(row.number, str(error))
        parts = self._parts(prepared, is_pair=is_pair)
        if isinstance(parts, Problem) and (with_texts := answers.with_texts(prepared)) is not prepared:
            of_texts = self._parts(with_texts, is_pair=is_pair)
            return (prepared, parts) if isinstance(of_texts, Problem) else (with_texts, of_texts)
        return prepared, parts

    def _parts(self, row: Row, *, is_pair: bool) -> list[Texts] | Problem:
        if row.is_text and self._encoder_decoder:
            return Problem(row.number, "a text has no prompt for the encoder; give prompt and completion")
        if not self._chat and not row.plain:
            return Problem(
                row.number,
                "messages need a chat template, which this tokenizer doesn't have; give one in dataset.chatTemplate",
            )
        if problem := suspicious_text.stop_token(row, self._stop_texts):
            return Problem(row.number, problem)
        if self._rendering.control_tokens == "refuse" and (problem := self._control_tokens.refusal(row)):
            return Problem(row.number, problem)
        if row.is_text:
            return [[("", row.turns[0].content)]]
        if not self._chat:
            return [[(row.plain_prompt or row.turns[0].content, row.turns[1].content)]]
        try:
            return self._dialogue(row, is_pair=is_pair)
        except TemplateRefusal as refusal:
            roles = ", ".join(turn.role for turn in row.turns[:_ROLES_SHOWN])
            return Problem(row.number, f"the chat template refuses it: {refusal} (its roles: {roles})")
        except answers.Inseparable as inseparable:
            return Problem(row.number, f"{inseparable}; fix it, or set dataset.chatTemplate")

    def _tokenized(self, pairs: Iterable[tuple[str, str]]) -> dict[str, list[int]]:
        """Tokenize each text that the pairs consist of once. Returns the ids by text."""
        texts: dict[str, None] = {}
        for before, answer in pairs:
            texts |= dict.fromkeys((answer,) if self._encoder_decoder else (before, before + answer))
        texts.pop("", None)
        return {"": [], **self._encoder.encode(texts)}

    def _joined(
        self, row: Row, parts: list[Texts], token_ids: dict[str, list[int]], max_length: int
    ) -> Example | Problem:
        """Return the last example of a row, with the earlier ones and what is lost of the row."""
        outcomes = [self._example(row, texts, token_ids, max_length) for texts in parts]
        usable = [outcome for outcome in outcomes if isinstance(outcome, Example)]
        if not usable:
            return outcomes[-1]
        trained = [texts for texts, outcome in zip(parts, outcomes, strict=True) if isinstance(outcome, Example)]
        return replace(usable[-1], earlier=tuple(usable[:-1]), omissions=self._omissions(row, trained))

    def _omissions(self, row: Row, parts: list[Texts]) -> tuple[Omission, ...]:
        suspicious = self._control_tokens.omissions(row)
        if not self._chat or row.is_text:
            return tuple(suspicious)
        pairs = [pair for texts in parts for pair in texts]
        suspicious += (*suspicious_text.frames(row), *suspicious_text.calls(row, parts[-1]))
        suspicious += suspicious_text.blanks(row, [answer for _, answer in pairs])
        expected, apart = 1 if self._rendering.answers == "last" else None, len(pairs) - len(parts[-1])
        return (*findings.omitted(row, pairs, expected, apart=apart), *suspicious)

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
        return Example(row.number, tuple(ids[:max_length]), tuple(loss_mask[:max_length]), source, len(ids))

    def _segments(self, row: Row, texts: Texts, token_ids: dict[str, list[int]]) -> list[tuple[list[int], bool]]:
        """Split a row into runs of tokens, each with whether it counts in the loss."""
        if row.is_text:
            ids = self._encoder.with_beginning(token_ids[texts[0][1]])
            return [(ids if ids[-1:] == [self._stop] else [*ids, self._stop], True)]
        if self._chat:
            return self._turns(texts, token_ids)
        ((prompt, completion),) = texts
        if self._encoder_decoder:
            return [(self._encoder.source(prompt), False), ([*token_ids[completion], self._stop], True)]
        before, answer = self._split(prompt, prompt + completion, token_ids)
        return [(self._encoder.with_beginning(before), False), ([*answer, self._stop], True)]

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

    def _dialogue(self, row: Row, *, is_pair: bool) -> list[Texts] | Problem:
        """Return the texts of each example of a dialogue. A preference pair has only one, with the
        last answer."""
        indices = [index for index, turn in enumerate(row.turns) if turn.role == "assistant" and turn.in_loss]
        trained = indices[-1:] if self._rendering.answers == "last" else indices
        parts = answers.examples(self._chat_template, row, trained, self._stop_texts)
        for piece in (piece for part in parts for piece in part):
            if problem := findings.changed_answer(row.turns[piece.turn], piece.answer):
                return Problem(row.number, f"the chat template {problem}")
        if problem := answers.missing_instruction(row, parts):
            return Problem(row.number, f"the chat template {problem}")
        parts = parts[-1:] if is_pair else parts
        return [answers.texts(part, row, masked=self._rendering.reasoning == "mask") for part in parts]

    def _split(self, before: str, full: str, token_ids: dict[str, list[int]]) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt exactly as at inference, and those that follow it."""
        prompt, both = token_ids[before], token_ids[full]
        if both[: len(prompt)] == prompt:
            return prompt, both[len(prompt) :]
        return prompt, self._encoder.ids(full[len(before) :])  # a token would extend over the border
