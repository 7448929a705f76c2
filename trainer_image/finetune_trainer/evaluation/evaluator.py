"""Computes the mean loss of a split per supervised token, or per preference pair.

The loss is one sum over the complete split, divided by its label count, so it depends neither on
the number of ranks nor on the size of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_api.messages.events import Rewards
from finetune_trainer.data.batching.batch_plan import MicroBatch, MicroBatchShape, split_into_micro_batches
from finetune_trainer.data.batching.collator import Batch, Collator
from finetune_trainer.data.splits import Split
from finetune_trainer.model import dpo
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.strategy import ParallelStrategy
from finetune_trainer.parallel.world import World

_EXAMPLES_PER_ROUND = 4096


@dataclass(frozen=True)
class SplitLoss:
    """Holds the loss of a split.

    `loss` is the mean per supervised token, or per preference pair, and `label_count` is the number
    of those tokens or pairs. `rows`, if requested, has -log p of each example's answer on every
    rank; for a pair, it is that of the chosen answer.
    """

    loss: float
    label_count: int
    rows: NDArray[np.float64] | None = None
    rewards: Rewards | None = None


@dataclass(frozen=True)
class Evaluator:
    """Computes losses on all ranks together. `heartbeat` is called after each micro-batch."""

    strategy: ParallelStrategy
    shape: MicroBatchShape
    collate: Collator
    loss_sum: LossSum
    world: World
    heartbeat: Callable[[], None]

    def measure(self, split: Split, *, by_row: bool = False) -> SplitLoss:
        """Returns the loss of a split; all ranks must call it together. `by_row` adds the loss of
        each row."""
        label_count = int(split.label_counts.sum())
        own = torch.zeros((), dtype=torch.float64, device=self.world.device)
        sums = self.loss_sum.metric_sums()
        row_losses: dict[int, float] = {}
        with self._evaluating():
            for micro_batch, batch in self.for_each_micro_batch(split):
                count = batch.answers // 2 if split.pairs else batch.targets.numel()
                losses = torch.empty(count, device=self.world.device) if by_row and micro_batch else None
                with self.loss_sum.packed_context(batch):
                    own += self.loss_sum(self.strategy.model, batch, losses, sums)
                if losses is not None:
                    row_losses.update(_by_row(split, micro_batch, losses, batch.own))
        total, *metrics = self.world.all_reduce_sum(float(own), *sums.tolist())
        rows = self._gathered(row_losses, len(split)) if by_row else None
        return SplitLoss(total / label_count, label_count, rows, dpo.rewards(metrics, label_count))

    def for_each_micro_batch(self, split: Split) -> Iterator[tuple[MicroBatch, Batch]]:
        """Yields this rank's micro-batches of a split, each with its tensors.

        Every rank gets the same number of micro-batches. Empty ones only keep it in step with the
        other ranks.
        """
        prefixes = split.prefixes if self.shape.shared else None
        for begin in range(0, len(split), _EXAMPLES_PER_ROUND):
            examples = range(begin, min(begin + _EXAMPLES_PER_ROUND, len(split)))
            by_rank = split_into_micro_batches(examples, split.lengths, self.shape, prefixes)
            for micro_batch in by_rank[self.world.data_rank]:
                yield micro_batch, self.collate(split, micro_batch)
                self.heartbeat()

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the model's logits for full rows, which are the same rows on every rank, in
        float32 on the CPU."""
        model = self.strategy.unwrapped
        with self._evaluating(), self.strategy.autocast(model):
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits.float().cpu()

    def _gathered(self, own: dict[int, float], count: int) -> NDArray[np.float64]:
        """Returns the losses of all ranks' rows, ordered by row, (count,). Those of the parts of a
        row are added."""
        rows = np.zeros(count)
        for part in self.world.all_gather(own, dict[int, float]):
            rows[list(part)] += list(part.values())
        return rows

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.strategy.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
        self.strategy.model.train()


def _by_row(
    split: Split, micro_batch: MicroBatch, losses: torch.Tensor, own: NDArray[np.int64] | None
) -> dict[int, float]:
    """Returns the sum of the losses of each example. The targets of a batch are in the order of its
    examples. If this rank has only a part of the row, `own` are its targets among those of all. A
    pair has one loss."""
    ends = np.cumsum(split.label_counts[list(micro_batch)])
    values = losses.double().cpu().numpy()
    if own is not None and not split.pairs:
        whole = np.zeros(ends[-1])
        whole[own] = values
        values = whole
    parts = np.split(values, ends[:-1])
    return {example: float(part.sum()) for example, part in zip(micro_batch, parts, strict=True)}
