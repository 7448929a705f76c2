"""Turns rendered texts into tokens, and control tokens inside the texts of a row into plain text.

A control token of a row that is to be plain text is replaced by a stand-in before the row is
rendered, so the template's own control tokens can be told from it. A copy of the tokenizer knows
the stand-ins, and the tokens of the plain text take their places.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from finetune_trainer.data import tokenizer as tokenizer_files
from finetune_trainer.data.reading.row import Row, Turn

_FIRST_STAND_IN = 0xF0000  # of a private-use area of Unicode
_PRIVATE = re.compile("[\U000f0000-\U000ffffd]")


class Encoder:
    """Encodes texts with one tokenizer. `literals` are the control tokens that are plain text
    inside a row."""

    def __init__(self, tokenizer: Any, literals: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = list(tokenizer("").input_ids)
        self.beginning = [tokenizer.bos_token_id] if added[:1] == [tokenizer.bos_token_id] else []
        self._stand_ins = {token: chr(_FIRST_STAND_IN + index) for index, token in enumerate(literals)}
        longest_first = sorted(literals, key=len, reverse=True)
        self._literals = re.compile("|".join(map(re.escape, longest_first))) if literals else None
        self._plain_ids: dict[int, list[int]] = {}
        self._knowing_stand_ins: Any = None

    def prepared(self, row: Row) -> Row:
        """Return a row with a stand-in for each control token that is plain text.

        Raises ValueError if the row has such a character itself.
        """
        if self._literals is None:
            return row
        texts = [text for turn in row.turns for text in (turn.content, turn.more)]
        texts += [row.tools, row.plain_prompt]
        character = next((match.group() for text in texts if (match := _PRIVATE.search(text))), None)
        if character is not None:
            raise ValueError(
                f"contains the private character U+{ord(character):X}, which dataset.rendering.controlTokens: encode "
                "uses itself; remove it"
            )
        if not any(self._literals.search(text) for text in texts):
            return row
        return replace(
            row,
            turns=tuple(map(self._prepared_turn, row.turns)),
            tools=self._replaced(row.tools),
            plain_prompt=self._replaced(row.plain_prompt),
        )

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Return the tokens of each text, without special tokens around them."""
        batch = list(texts)
        special = [text for text in batch if self._literals is not None and _PRIVATE.search(text)]
        usual = [text for text in batch if text not in set(special)] if special else batch
        ids = dict(zip(usual, tokenizer_files.encode(self._tokenizer, usual), strict=True)) if usual else {}
        return {**ids, **dict(self._with_plain_text(special))}

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens around them."""
        return self.encode([text])[text] if text else []

    def source(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt for an encoder, with the special tokens around it."""
        if self._literals is None or not _PRIVATE.search(prompt):
            return list(self._tokenizer(prompt).input_ids)
        return list(self._tokenizer.build_inputs_with_special_tokens(self.ids(prompt)))

    def with_beginning(self, ids: list[int]) -> list[int]:
        """Return tokens with the one that the tokenizer puts before any text, if it does."""
        return ids if ids[: len(self.beginning)] == self.beginning else [*self.beginning, *ids]

    def _prepared_turn(self, turn: Turn) -> Turn:
        return replace(
            turn,
            content=self._replaced(turn.content),
            more=self._replaced(turn.more),
            as_text=self._replaced(turn.as_text),
        )

    def _replaced(self, text: str) -> str:
        if self._literals is None:
            return text
        return self._literals.sub(lambda match: self._stand_ins[match.group()], text)

    def _with_plain_text(self, texts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
        if texts and self._knowing_stand_ins is None:
            self._learn_stand_ins()
        for text in texts:
            (ids,) = tokenizer_files.encode(self._knowing_stand_ins, [text])
            yield text, [inner for token in ids for inner in self._plain_ids.get(token, (token,))]

    def _learn_stand_ins(self) -> None:
        """Add the stand-ins to a copy of the tokenizer, as tokens between which texts are split."""
        from tokenizers import AddedToken

        self._knowing_stand_ins = copy.deepcopy(self._tokenizer)
        characters = list(self._stand_ins.values())
        self._knowing_stand_ins.add_tokens(
            [AddedToken(character, normalized=False, special=True) for character in characters], special_tokens=True
        )
        numbers = self._knowing_stand_ins.convert_tokens_to_ids(characters)
        self._plain_ids = {number: self._plain(token) for number, token in zip(numbers, self._stand_ins, strict=True)}

    def _plain(self, token: str) -> list[int]:
        """Return the tokens of a control token as plain text, without a blank that a tokenizer puts
        before the first word."""
        letter, both = (
            list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
            for text in ("x", f"x{token}")
        )
        if both[: len(letter)] == letter:
            return both[len(letter) :]
        return list(self._tokenizer(token, add_special_tokens=False, split_special_tokens=True).input_ids)
