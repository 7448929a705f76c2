"""What a resumed run takes from its checkpoint, and in which layout it writes its own. Called by `assembly`.

The checkpoint may be of another world, strategy or layout: every rank reads from it what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from finetune_api.run import RunConfig
from finetune_trainer import shards, stored
from finetune_trainer.checkpoint import State
from finetune_trainer.failure import Failed
from finetune_trainer.learner import Divided, Learner
from finetune_trainer.paths import Paths
from finetune_trainer.reporter import Reporter
from finetune_trainer.shards import Sharding
from finetune_trainer.world import World

if TYPE_CHECKING:
    from finetune_trainer.train import Training


def sharding(run: RunConfig, learner: Learner, world: World, reporter: Reporter, trained: int) -> Sharding | None:
    """None where rank 0 writes whole tensors. `trained` counts weights."""
    choice, reason = shards.choose(run.checkpoint.shards, run.world.strategy, world.size, trained)
    reporter.decision("checkpointShards", "on" if choice else "off", reason)
    if not choice:
        return None
    if not isinstance(learner, Divided):
        raise TypeError(f"{type(learner).__name__} has no parts")
    return shards.sharding(learner, world)


def put_weights(learner: Learner, names: Iterable[str], paths: Paths) -> None:
    """The checkpoint's weights, which must have these names."""
    weights = stored.open_kind(paths.resume, "weights")
    if weights is None:
        raise Failed("TrainingError", "the checkpoint to resume from holds no weights")
    stored.check_names(weights, names)
    learner.set_weights(weights)


def put_moments(t: Training, saved: State | None) -> None:
    """And the best weights so far. Nothing on a fresh start."""
    if saved is not None and saved.updates:
        moments = stored.open_kind(t.paths.resume, "optimizer")
        if moments is None:
            raise Failed("TrainingError", "the checkpoint to resume from holds no optimizer state")
        t.learner.set_moments(moments, saved.updates)
    t.best.recover(t.paths.resume, saved if t.run.training.keep_best else None)
