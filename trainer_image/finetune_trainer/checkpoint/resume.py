"""Restores what a resumed run needs from its checkpoint, and decides in which layout the run writes
its own checkpoints.

The checkpoint may come from another world size, strategy or layout: every rank reads the part that
it needs.
"""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.messages.run import RunConfig
from finetune_trainer.checkpoint import reader, sharded
from finetune_trainer.checkpoint.best_weights import BestWeights
from finetune_trainer.checkpoint.sharded import Sharding
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.errors import RunError
from finetune_trainer.parallel.strategy import ParallelStrategy, ShardedStrategy
from finetune_trainer.parallel.world import World
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.event_writer import EventWriter


def sharding(
    run: RunConfig, strategy: ParallelStrategy, world: World, reporter: EventWriter, trained: int
) -> Sharding | None:
    """Decides whether checkpoints are sharded, and logs the decision. Returns None if rank 0 writes
    full tensors.

    `trained` is the number of trained weights. Raises TypeError if the strategy can't write shards.
    """
    use_shards, reason = sharded.choose(run.checkpoint.shards, run.world.strategy, world.size, trained)
    reporter.decision("checkpointShards", "on" if use_shards else "off", reason)
    if not use_shards:
        return None
    if not isinstance(strategy, ShardedStrategy):
        raise TypeError(f"{type(strategy).__name__} can't write shards: every rank holds everything")
    return sharded.sharding(strategy, world)


def put_weights(strategy: ParallelStrategy, names: Iterable[str], paths: Paths) -> None:
    """Sets the model's weights to those of the checkpoint.

    Raises RunError if the checkpoint has no weights, or if `names` aren't their names.
    """
    weights = reader.open_kind(paths.resume, "weights")
    if weights is None:
        raise RunError("TrainingError", "the checkpoint to resume from has no weights")
    reader.check_names(weights, names)
    strategy.set_weights(weights)


def put_optimizer_state(
    strategy: ParallelStrategy, best: BestWeights, saved: CheckpointState | None, paths: Paths, *, keep_best: bool
) -> None:
    """Sets the optimizer state to that of the checkpoint, and saves the checkpoint's best weights.
    On a fresh start, neither exists.

    Raises RunError if the checkpoint lacks the optimizer state.
    """
    if saved is not None and saved.updates:
        moments = reader.open_kind(paths.resume, "optimizer")
        if moments is None:
            raise RunError("TrainingError", "the checkpoint to resume from has no optimizer state")
        strategy.set_optimizer_state(moments, saved.updates)
    best.recover(paths.resume, saved if keep_best else None)
