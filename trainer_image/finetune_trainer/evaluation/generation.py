"""Generates answers to prompts, several at a time.

A batch is padded on the side that keeps a model's positions right: on the left for a decoder, on
the right for an encoder. Which prompts share a batch depends on their lengths and not on the number
of ranks, so neither do the answers depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.resource import GenerationSpec
from finetune_trainer.data.batching.collator import Padding
from finetune_trainer.kernels import padding

_MAX_BATCH = 32  # prompts

Batch = tuple[int, ...]
"""The indices of the prompts in a batch."""


@dataclass(frozen=True)
class Answer:
    """Holds a generated answer. It is `finished` if it ended with a stop token rather than at the
    limit."""

    text: str
    finished: bool


@dataclass(frozen=True)
class GenerationSettings:
    """Describes how answers are generated: until one of the stop tokens, or up to `max_new_tokens`.

    `positions` is the model's limit, if any.
    """

    tokenizer: Any
    stop_tokens: frozenset[int]
    max_new_tokens: int
    spec: GenerationSpec
    positions: int | None = None
    device: torch.device | str = "cpu"

    @property
    def first_token(self) -> int:
        """The token that is used in place of an empty prompt."""
        token = self.tokenizer.bos_token_id
        return int(token) if token is not None else min(self.stop_tokens, default=self.pad_token)

    @property
    def pad_token(self) -> int:
        """The token that pads shorter prompts."""
        token = self.tokenizer.pad_token_id
        return int(token) if token is not None else min(self.stop_tokens, default=0)


def batches(lengths: Sequence[int], max_new_tokens: int, tokens: int) -> list[Batch]:
    """Divides prompts into batches of similar lengths, the longest first.

    Including its answers, a batch has at most `tokens` tokens, or it has a single prompt. No batch
    has more than _MAX_BATCH prompts.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    divided: list[Batch] = []
    while order:
        rows = max(1, min(_MAX_BATCH, tokens // (lengths[order[0]] + max_new_tokens)))
        divided.append(tuple(order[:rows]))
        order = order[rows:]
    return divided


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    seed: int,
    heartbeat: Callable[[], None],
) -> list[Answer]:
    """Returns the answers in the order of the prompts. `heartbeat` is called for every generated
    token."""
    from transformers import StoppingCriteriaList

    encoder_decoder = bool(model.config.is_encoder_decoder)
    ids, mask = _padded(
        [prompt or [settings.first_token] for prompt in prompts], settings.pad_token, left=not encoder_decoder
    )
    max_new_tokens = settings.max_new_tokens
    if settings.positions is not None and not encoder_decoder:
        max_new_tokens = max(1, min(max_new_tokens, settings.positions - ids.shape[1]))
    torch.manual_seed(seed)
    spec, device = settings.spec, settings.device
    sampling = {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": 0} if spec.temperature > 0 else {}
    blank = mask.to(device) == 0
    with padding.masked(Padding(encoder=blank) if encoder_decoder else Padding(decoder=blank)):
        sequences = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=spec.temperature > 0,
            num_beams=1,
            repetition_penalty=spec.repetition_penalty,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(settings.stop_tokens),
            pad_token_id=settings.pad_token,
            synced_gpus=False,  # every rank has the full model
            stopping_criteria=StoppingCriteriaList([_Heartbeat(heartbeat)]),
            **sampling,
        )
    first = 1 if encoder_decoder else ids.shape[1]
    return [_answer(row[first:].tolist(), settings) for row in sequences]


def _answer(tokens: list[int], settings: GenerationSettings) -> Answer:
    end = next((index for index, token in enumerate(tokens) if token in settings.stop_tokens), None)
    text = settings.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return Answer(str(text).strip(), end is not None)


def _padded(prompts: Sequence[Sequence[int]], pad_token: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (token ids, attention mask), both of the shape (prompts, longest prompt)."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_token, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        positions = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, positions] = torch.tensor(list(prompt))
        mask[row, positions] = 1
    return ids, mask


class _Heartbeat:
    """Implements a stopping criterion that never stops, but calls a function for every token."""

    def __init__(self, heartbeat: Callable[[], None]) -> None:
        self._heartbeat = heartbeat

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._heartbeat()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
