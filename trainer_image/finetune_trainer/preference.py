"""Preference tuning by DPO (Rafailov et al. 2023): of two answers to a prompt, the chosen one shall gain on the other.

The loss of a pair is -log sigmoid(beta * ((log p_chosen - log ref_chosen) - (log p_rejected - log ref_rejected))), with
log p summed over an answer's tokens. A pair is one example: its prompt is computed once (`batch`). What the reference
says, which is the model as it begins, is computed once before the first step. Called by `assembly`; the loop takes
`PreferenceSum` for a `LossSum`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from finetune_api.events import Rewards
from finetune_trainer import plan
from finetune_trainer.batch import Batch, Collator
from finetune_trainer.data import Data
from finetune_trainer.failure import Failed
from finetune_trainer.learner import Learner
from finetune_trainer.loss import LossSum
from finetune_trainer.pairs import FORMAT
from finetune_trainer.split import Split
from finetune_trainer.world import World

_TOGETHER = 4096  # pairs that are spread over ranks at once


@dataclass(frozen=True)
class PreferenceSum(LossSum):
    """A micro-batch's pairs → the sum of their losses, a float32 scalar."""

    beta: float = 0.1

    @classmethod
    def over(cls, inner: LossSum, beta: float) -> PreferenceSum:
        return cls(inner.keeps_logits, inner.autocast, inner.device, inner.head, beta)

    def tally(self) -> Tensor:
        """The sums that `rewards` divides."""
        return torch.zeros(len(Rewards.model_fields), dtype=torch.float64, device=self.device)

    def __call__(
        self, model: Callable[..., Any], batch: Batch, each: Tensor | None = None, tally: Tensor | None = None
    ) -> Tensor:
        """Call it inside `room(batch)`. A pair weighs one. `each` gets -log p of each chosen answer, and zeros behind
        the last: perplexity is that of the chosen answers."""
        log_p = log_probabilities(self, model, batch)
        if batch.reference is None:  # nothing to do but to take part
            return log_p.sum() * 0.0
        gains = log_p - batch.reference.to(log_p.dtype)
        losses = loss_of(gains[:, 0], gains[:, 1], self.beta)
        if each is not None:
            each.zero_()[: len(losses)] = -log_p[:, 0].detach()
        if tally is not None:
            tally += _figures(log_p.detach(), self.beta * gains.detach())
        return losses.sum()


def loss_of(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """By pair; `chosen` and `rejected` say how much log p gained on the reference."""
    return -functional.logsigmoid(beta * (chosen - rejected))


def rewards(sums: Sequence[float], pairs: int) -> Rewards | None:
    """Of so many pairs, from what a `tally` came to. None where the objective has none."""
    if not sums:
        return None
    means = (value / pairs for value in sums)
    return Rewards(**dict(zip(Rewards.model_fields, means, strict=True)))


def _figures(log_p: Tensor, gained: Tensor) -> Tensor:
    """Sums over the pairs, in the order of Rewards' fields; both are (pairs, 2)."""
    margins = gained[:, 0] - gained[:, 1]
    parts = (*gained.unbind(1), margins, (margins > 0).to(gained.dtype), *log_p.unbind(1))
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])


def log_probabilities(loss_sum: LossSum, model: Callable[..., Any], batch: Batch) -> Tensor:
    """(pairs, 2): log p of the chosen and of the rejected answer, summed over its tokens."""
    apiece = loss_sum.apiece(model, batch)
    if batch.answer is None:
        return apiece.reshape(-1, 1).sum().reshape(1, 1).expand(1, 2)
    answers = apiece.new_zeros(int(batch.answer.max()) + 1).index_add(0, batch.answer, -apiece)
    return answers.view(-1, 2)


@dataclass(frozen=True)
class Reference:
    """Says what the model gives for each answer of a split, before anything was learnt; the same on every rank.
    `aside`: adapters are switched off, which leave the base as it was."""

    learner: Learner
    shape: plan.Shape
    collate: Collator
    loss_sum: LossSum
    world: World
    alive: Callable[[], None]
    aside: bool

    def beside(self, data: Data, cache: Path, key: str) -> Data:
        """Every split with its reference. `key`: of what the numbers depend on beside the rows."""
        told: dict[str, Any] = {
            name: self._of(part, cache, f"{key} {data.key} {name}")
            for name in ("train", "validation", "test")
            if (part := getattr(data, name)) is not None
        }
        return replace(data, **told)

    def _of(self, split: Split, cache: Path, key: str) -> Split:
        """From the cache of this node where every node has it."""
        path = cache / f"reference-{_name(key, split)}.npy"
        if all(self.world.everyones(path.is_file())):
            return replace(split, reference=np.load(path, mmap_mode="r"))
        found = self._computed(split)
        if self.world.is_first_of_node:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{os.getpid()}.tmp.npy")
            np.save(aside, found)
            os.replace(aside, path)
        return replace(split, reference=found)

    def _computed(self, split: Split) -> NDArray[np.float64]:
        """(examples, 2). Each rank does its share, and sums tell all of them."""
        prefixes = split.prefixes if self.shape.shared else None
        own = torch.zeros(len(split), 2, dtype=torch.float64, device=self.world.device)
        model = self.learner.model
        model.eval()
        without = self.learner.plain.disable_adapter() if self.aside else nullcontext()
        with torch.no_grad(), without:
            for begin in range(0, len(split), _TOGETHER):
                some = range(begin, min(begin + _TOGETHER, len(split)))
                for micro in plan.cut(some, split.lengths, self.shape, prefixes)[self.world.rank]:
                    batch = self.collate(split, micro)
                    with self.loss_sum.room(batch):
                        told = log_probabilities(self.loss_sum, model, batch)
                    if micro:
                        own[list(micro)] = told.double()
                    self.alive()
        model.train()
        if self.world.size > 1:
            torch.distributed.all_reduce(own)
        return own.cpu().numpy()


def examples(data: Data, objective: str) -> Data:
    """Pairs where the objective learns from pairs. Raises Failed where rows and objective don't go together."""
    parts = {name: part for name in ("train", "validation", "test") if (part := getattr(data, name)) is not None}
    formats = {part.tokens.facts.format for part in parts.values()}
    if objective == "supervised" and FORMAT in formats:
        raise Failed(
            "DatasetInvalid",
            "dataset.uri: the rows have chosen and rejected answers; set training.objective: dpo, or give one answer",
        )
    if objective == "dpo" and formats != {FORMAT}:
        raise Failed("DatasetInvalid", "dataset.uri: objective dpo needs rows with prompt, chosen and rejected")
    if objective == "supervised":
        return data
    told: dict[str, Any] = {name: replace(part, pairs=True) for name, part in parts.items()}
    return replace(data, **told)


def content(folder: Path) -> str:
    """A model's files as far as a name for a cache needs: their sizes and beginnings."""
    whole = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with path.open("rb") as file:
            whole.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(2**20))
    return whole.hexdigest()


def _name(key: str, split: Split) -> str:
    return hashlib.sha256(f"{key} ".encode() + split.index.tobytes()).hexdigest()[:32]
