"""What the parts of training share: who this rank is, and everything that was put together before
the first step."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.messages.run import RunConfig
from finetune_trainer.checkpoint import cadence, local_folder
from finetune_trainer.checkpoint.async_saver import Saver
from finetune_trainer.checkpoint.best_weights import BestWeights
from finetune_trainer.checkpoint.sharded import Sharding
from finetune_trainer.data.batching.batch_plan import BatchPlan
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.splits import Split
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.strategy import ParallelStrategy
from finetune_trainer.parallel.world import World
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.event_writer import EventWriter
from finetune_trainer.training import anomalies


@dataclass(frozen=True)
class RankContext:
    """A rank's view of a run: its configuration as the operator wrote it, its disk, its peers, its
    events."""

    run: RunConfig
    paths: Paths
    world: World
    reporter: EventWriter


@dataclass(frozen=True)
class Training:
    """What the loop needs. Every rank holds the same, except for its own identity in `context`.

    `unhalved` is the plan before micro-batches were halved for lack of memory. `sharding` is None
    if rank 0 gathers checkpoints.
    """

    context: RankContext
    plan: BatchPlan
    unhalved: BatchPlan
    train: Split
    validation: Split | None
    strategy: ParallelStrategy
    collate: Collator
    loss_sum: LossSum
    sharding: Sharding | None

    @property
    def run(self) -> RunConfig:
        return self.context.run

    @property
    def paths(self) -> Paths:
        return self.context.paths

    @property
    def world(self) -> World:
        return self.context.world

    @property
    def reporter(self) -> EventWriter:
        return self.context.reporter

    @property
    def evaluator(self) -> Evaluator:
        """Measures losses as training computes them now, in today's micro-batches."""
        return Evaluator(
            self.strategy, self.plan.shape, self.collate, self.loss_sum, self.world, self.reporter.heartbeat
        )

    @property
    def best(self) -> BestWeights:
        """The weights with the lowest evaluation loss so far, on disk."""
        return BestWeights(self.paths.best, self.strategy, self.world, self.sharding)

    def saver(self) -> Saver:
        """Writes checkpoints while training continues. Reports how often."""
        recipe, total = self.run.training, self.plan.total_steps
        rolls_back = recipe.loss_spike.action == "rollback"
        when, reason = cadence.cadence(self.run.checkpoint.every, total, exact=rolls_back)
        self.reporter.decision("checkpoints", str(when), reason)
        return Saver(
            self.world,
            self.strategy,
            self.reporter,
            self.paths.checkpoints,
            self.run.job,
            when,
            best=self.best if recipe.keep_best else None,
            keep=local_folder.KEPT_LOCALLY + (anomalies.SPIKE_STEPS if rolls_back else 0),
            sharding=self.sharding,
        )
