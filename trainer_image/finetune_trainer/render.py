"""Turns a row into tokens and marks what is learnt: text → ids, labels. No torch; deterministic.

Called by `examples`. The prompt is masked by construction: what a model gets to see at inference (the rendered
prompt, tokenised alone) is the prompt, what follows up to the stop token is learnt. No string is ever searched for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.failure import Failed
from finetune_trainer.rows import Problem, Row, Turn


@dataclass(frozen=True)
class Example:
    """`learnt[i]` is true where token i is predicted and counted in the loss; it never is for the first token.

    For an encoder-decoder the first `source` tokens go to the encoder and the rest to the decoder.
    """

    number: int
    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    source: int = 0


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer, without importing torch where there is a tokenizer.json."""
    try:
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, json.JSONDecodeError) as error:
        raise Failed("ModelInvalid", f"model.uri: no tokenizer can be loaded from the folder ({error})") from None


def is_encoder_decoder(folder: Path) -> bool:
    """Read from config.json alone."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise Failed("ModelInvalid", f"model.uri: config.json can't be read ({error})") from None
    return bool(config.get("is_encoder_decoder", False)) if isinstance(config, dict) else False


def stop_tokens(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's and the generation configuration's."""
    found: set[int] = set()
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    path = folder / "generation_config.json"
    if path.is_file():
        declared = json.loads(path.read_text()).get("eos_token_id")
        found.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    if not found:
        raise Failed(
            "ModelInvalid",
            "model.uri: neither the tokenizer nor generation_config.json names an end-of-sequence token, so an answer "
            "could never end; set eos_token in tokenizer_config.json",
        )
    return frozenset(found)


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
        added = list(tokenizer("").input_ids)
        self._first = [tokenizer.bos_token_id] if added[:1] == [tokenizer.bos_token_id] else []

    @classmethod
    def load(cls, folder: Path, max_length: int) -> Renderer:
        tokenizer = load_tokenizer(folder)
        return cls(
            tokenizer,
            stop_tokens(tokenizer, folder),
            max_length=max_length,
            encoder_decoder=is_encoder_decoder(folder),
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

    def render(self, row: Row) -> Example | Problem:
        """The row's tokens, cut to the longest length, or why nothing is left to learn."""
        if not self._chat and not row.plain:
            return Problem(row.number, "messages need a chat template, which this tokenizer doesn't have")
        try:
            pieces = self._turns(row.turns) if self._chat else self._plain(row.turns)
        except TemplateRefusal as refusal:
            return Problem(row.number, f"the chat template refuses it: {refusal}")
        ids = [token for piece, _ in pieces for token in piece]
        learnt = [flag for piece, flag in pieces for _ in piece]
        source = len(pieces[0][0]) if self._encoder_decoder else 0
        if self._encoder_decoder and source == 0:
            return Problem(row.number, "the prompt is empty, and an encoder needs at least one token")
        learnt[0] = False  # nothing comes before it that could predict it
        if not any(learnt[: self._max_length]):
            first = learnt.index(True) if any(learnt) else len(ids)
            return Problem(
                row.number,
                f"the prompt has {first} tokens, so of dataset.maxSequenceLength {self._max_length} none is left "
                "to learn",
            )
        end = self._max_length
        return Example(row.number, tuple(ids[:end]), tuple(learnt[:end]), source)

    def prompt(self, row: Row) -> list[int]:
        """What generation starts from: everything before the last answer, as at inference."""
        if self._encoder_decoder:
            return self._source(row.turns[0].content)
        if not self._chat:
            return self._first_once(self._ids(row.turns[0].content))
        return self._ids(self._template(row.turns[:-1], answer=True))

    def _plain(self, turns: tuple[Turn, ...]) -> list[tuple[list[int], bool]]:
        prompt, completion = turns[0].content, turns[1].content
        if self._encoder_decoder:
            return [(self._source(prompt), False), ([*self._ids(completion), self._stop], True)]
        before, answer = self._split(prompt, prompt + completion)
        return [(self._first_once(before), False), ([*answer, self._stop], True)]

    def _turns(self, turns: tuple[Turn, ...]) -> list[tuple[list[int], bool]]:
        """Alternating prompt and answer pieces; every answer ends with a stop token, the last one at the very end."""
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        # Some templates render an earlier answer differently once another follows (they drop its reasoning): then
        # the last answer alone is learnt, seen after exactly what inference would show.
        pieces = self._pieces(turns, answers) or self._pieces(turns, answers[-1:])
        if pieces is None:
            raise Failed(
                "ModelInvalid",
                "model.uri: the chat template renders a prompt alone differently from the same prompt with its answer, "
                "so what is learnt can't be told apart; mend chat_template",
            )
        rendered: list[tuple[list[int], bool]] = []
        for before, answer in pieces:
            prompt_ids, answer_ids = self._split(before, before + answer)
            stop = next((i for i, token in enumerate(answer_ids) if token in self._stops), len(answer_ids) - 1)
            rendered += [(prompt_ids, False), (answer_ids[: stop + 1], True), (answer_ids[stop + 1 :], False)]
        last = rendered[-2][0]
        if not last or last[-1] not in self._stops:  # the template ends no turn; without this an answer would never end
            last.append(self._stop)
        return rendered[:-1]  # nothing follows the last stop token

    def _pieces(self, turns: tuple[Turn, ...], answers: list[int]) -> list[tuple[str, str]] | None:
        """(what comes before, the answer) of each answer, or None where one rendering is no prefix of the next."""
        pieces: list[tuple[str, str]] = []
        done = ""
        for index in answers:
            before = self._template(turns[:index], answer=True)
            whole = self._template(turns[: index + 1])
            if not before.startswith(done) or not whole.startswith(before):
                return None
            pieces.append((before[len(done) :], whole[len(before) :]))
            done = whole
        return pieces

    def _template(self, turns: tuple[Turn, ...], *, answer: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        chat = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer))
        except TemplateError as error:
            raise TemplateRefusal(error) from None

    def _split(self, before: str, whole: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt exactly as at inference, and those that follow it."""
        prompt, both = self._ids(before), self._ids(whole)
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
