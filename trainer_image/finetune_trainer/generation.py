"""Prompts → answers, several at once. Called by `answers` on every rank with batches that all ranks planned alike.

A batch is padded on the side where a model's positions stay right: on the left for a decoder, on the right for an
encoder. Which prompts share a batch depends on their lengths, not on the number of ranks, so answers don't either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.resource import GenerationSpec

_MOST = 32  # prompts at once

Batch = tuple[int, ...]
"""Numbers of prompts."""


@dataclass(frozen=True)
class Answer:
    """`finished`: it ended by a stop token, not because it became too long."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Speech:
    """How answers are generated: until a stop token, or `max_new_tokens`. `positions` is the model's limit, if any.

    `together`: weights are split over the ranks, so each has to compute as many tokens as all others.
    """

    tokenizer: Any
    stops: frozenset[int]
    max_new_tokens: int
    together: bool
    how: GenerationSpec
    positions: int | None = None
    device: torch.device | str = "cpu"

    @property
    def first(self) -> int:
        """What an empty prompt begins with."""
        found = self.tokenizer.bos_token_id
        return int(found) if found is not None else min(self.stops, default=self.pad)

    @property
    def pad(self) -> int:
        found = self.tokenizer.pad_token_id
        return int(found) if found is not None else min(self.stops, default=0)


def batches(lengths: Sequence[int], max_new_tokens: int, tokens: int) -> list[Batch]:
    """Prompts of like length together, the longest first; with their answers at most `tokens` a batch."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    made: list[Batch] = []
    while order:
        rows = max(1, min(_MOST, tokens // (lengths[order[0]] + max_new_tokens)))
        made.append(tuple(order[:rows]))
        order = order[rows:]
    return made


def generate(
    model: Any, prompts: Sequence[Sequence[int]], speech: Speech, *, seed: int, alive: Callable[[], None]
) -> list[Answer]:
    """In the prompts' order. `alive` is called for every token."""
    from transformers import StoppingCriteriaList

    encoder_decoder = bool(model.config.is_encoder_decoder)
    ids, mask = _padded([prompt or [speech.first] for prompt in prompts], speech.pad, left=not encoder_decoder)
    new = speech.max_new_tokens
    if speech.positions is not None and not encoder_decoder:
        new = max(1, min(new, speech.positions - ids.shape[1]))
    torch.manual_seed(seed)
    how, device = speech.how, speech.device
    sampling = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature > 0 else {}
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        do_sample=how.temperature > 0,
        num_beams=1,
        repetition_penalty=how.repetition_penalty,
        max_new_tokens=new,
        eos_token_id=sorted(speech.stops),
        pad_token_id=speech.pad,
        synced_gpus=speech.together,
        stopping_criteria=StoppingCriteriaList([_Beat(alive)]),
        **sampling,
    )
    first = 1 if encoder_decoder else ids.shape[1]
    return [_answer(row[first:].tolist(), speech) for row in out]


def _answer(tokens: list[int], speech: Speech) -> Answer:
    end = next((place for place, token in enumerate(tokens) if token in speech.stops), None)
    text = speech.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return Answer(str(text).strip(), end is not None)


def _padded(prompts: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place] = torch.tensor(list(prompt))
        mask[row, place] = 1
    return ids, mask


class _Beat:
    """Ends nothing: says that work goes on."""

    def __init__(self, alive: Callable[[], None]) -> None:
        self._alive = alive

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._alive()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
