"""The mean loss of a split per learnt token. Called by the loop and by `measure` on all ranks together.

The loss is one sum over the whole split divided by its learnt tokens, so it depends neither on ranks nor on batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_api.events import Rewards
from finetune_trainer import plan, preference
from finetune_trainer.batch import Collator
from finetune_trainer.learner import Learner
from finetune_trainer.loss import LossSum
from finetune_trainer.split import Split
from finetune_trainer.world import World

_TOGETHER = 4096  # examples that are spread over ranks at once


@dataclass(frozen=True)
class Measured:
    """`loss` is the mean per learnt token, or pair; `rows` has -log p of each example's answer (of a pair, the chosen
    one), on every rank, where that was asked for."""

    loss: float
    labels: int
    rows: NDArray[np.float64] | None = None
    rewards: Rewards | None = None


@dataclass(frozen=True)
class Evaluator:
    """What evaluation needs of a run. `alive` is called between pieces of work."""

    learner: Learner
    shape: plan.Shape
    collate: Collator
    loss_sum: LossSum
    world: World
    alive: Callable[[], None]

    def measure(self, split: Split, *, by_row: bool = False) -> Measured:
        lengths, labels = split.lengths, int(split.label_counts.sum())
        prefixes = split.prefixes if self.shape.shared else None
        own = torch.zeros((), dtype=torch.float64, device=self.world.device)
        tally = self.loss_sum.tally()
        rows: dict[int, float] = {}
        with self._evaluating():
            for begin in range(0, len(split), _TOGETHER):
                some = range(begin, min(begin + _TOGETHER, len(split)))
                for micro in plan.cut(some, lengths, self.shape, prefixes)[self.world.rank]:
                    batch = self.collate(split, micro)
                    each = torch.empty(batch.targets.shape, device=self.world.device) if by_row and micro else None
                    with self.loss_sum.room(batch):
                        own += self.loss_sum(self.learner.model, batch, each, tally)
                    if each is not None:
                        rows.update(_by_row(split, micro, each))
                    self.alive()
        total, *sums = self.world.total(float(own), *tally.tolist())
        told = self._everyones(rows, len(split)) if by_row else None
        return Measured(total / labels, labels, told, preference.rewards(sums, labels))

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What the model says to whole rows, the same on every rank; float32 on the CPU."""
        half = self.loss_sum.autocast
        with self._evaluating(), torch.autocast(self.world.device.type, half, enabled=half is not None):
            logits: torch.Tensor = self.learner.plain(**inputs, use_cache=False).logits
        return logits.float().cpu()

    def _everyones(self, own: dict[int, float], count: int) -> NDArray[np.float64]:
        whole = np.zeros(count)
        for part in self.world.everyones(own):
            whole[list(part)] = list(part.values())
        return whole

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.learner.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
        self.learner.model.train()


def _by_row(split: Split, micro: plan.Micro, each: torch.Tensor) -> dict[int, float]:
    """A batch's targets come example by example."""
    ends = np.cumsum(split.label_counts[list(micro)])
    parts = np.split(each.double().cpu().numpy(), ends[:-1])
    return {example: float(part.sum()) for example, part in zip(micro, parts, strict=True)}
