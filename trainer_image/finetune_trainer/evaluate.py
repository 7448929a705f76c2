"""The mean loss of a split per learnt token, and answers to its prompts. Called by the loop on all ranks together.

The loss is one sum over the whole split divided by its learnt tokens, so it depends neither on ranks nor on batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer import plan
from finetune_trainer.batch import Collator
from finetune_trainer.learner import Learner
from finetune_trainer.loss import LossSum
from finetune_trainer.split import Split
from finetune_trainer.world import World

_TOGETHER = 4096  # examples that are spread over ranks at once


@dataclass(frozen=True)
class Speech:
    """How answers are generated: greedily, until a stop token. `together`: weights are split, so all ranks help."""

    tokenizer: Any
    stops: frozenset[int]
    max_new_tokens: int
    together: bool


@dataclass(frozen=True)
class Evaluator:
    """What evaluation needs of a run. `alive` is called between pieces of work."""

    learner: Learner
    shape: plan.Shape
    collate: Collator
    loss_sum: LossSum
    world: World
    alive: Callable[[], None]

    def loss(self, split: Split) -> tuple[float, int]:
        """(mean loss, learnt tokens)"""
        lengths, labels = split.lengths, int(split.label_counts.sum())
        prefixes = split.prefixes if self.shape.shared else None
        own = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with self._evaluating():
            for begin in range(0, len(split), _TOGETHER):
                some = range(begin, min(begin + _TOGETHER, len(split)))
                for micro in plan.cut(some, lengths, self.shape, prefixes)[self.world.rank]:
                    batch = self.collate(split, micro)
                    with self.loss_sum.room(batch):
                        own += self.loss_sum(self.learner.model, batch)
                    self.alive()
        (total,) = self.world.total(float(own))
        return total / labels, labels

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What the model says to whole rows, the same on every rank; float32 on the CPU."""
        half = self.loss_sum.autocast
        with self._evaluating(), torch.autocast(self.world.device.type, half, enabled=half is not None):
            logits: torch.Tensor = self.learner.plain(**inputs, use_cache=False).logits
        return logits.float().cpu()

    def answers(self, prompts: list[list[int]], speech: Speech) -> tuple[str, ...]:
        """By prompt, on every rank."""
        own: dict[int, str] = {}
        half = self.loss_sum.autocast
        with self._evaluating(), torch.autocast(self.world.device.type, half, enabled=half is not None):
            for index, prompt in enumerate(prompts):
                if speech.together or index % self.world.size == self.world.rank:
                    own[index] = self._answer(prompt, speech)
                    self.alive()
        merged: dict[int, str] = {}
        for part in self.world.everyones(own):
            merged.update(part)
        return tuple(merged[index] for index in range(len(prompts)))

    def _answer(self, prompt: list[int], speech: Speech) -> str:
        model, tokenizer = self.learner.plain, speech.tokenizer
        ids = torch.tensor([prompt], device=self.world.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=speech.max_new_tokens,
            eos_token_id=sorted(speech.stops),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(speech.stops),
            synced_gpus=speech.together,
        )
        new = out[0] if model.config.is_encoder_decoder else out[0, len(prompt) :]
        return str(tokenizer.decode(new, skip_special_tokens=True)).strip()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.learner.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
        self.learner.model.train()
