"""What all ranks agree on after a step's micro-batches, before anything is changed.

They exchange one small message per step, and a second one with the details only if something went
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.data.batching.batch_plan import Step
from finetune_trainer.data.splits import Split
from finetune_trainer.parallel.world import World


@dataclass(frozen=True)
class OwnMicroBatches:
    """The micro-batches of a rank.

    `nll` has the summed loss of each. `metric_sums` are those of the loss (see `LossSum`).
    `out_of_memory` is the error message if one of them ran out of memory. `seconds` is how long
    this rank needed for them.
    """

    nll: tuple[float, ...]
    out_of_memory: str = ""
    metric_sums: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class StepOutcome:
    """A step of all ranks; the same on each of them.

    `loss` is the mean per token that counts in it, or per pair. `stop` and `checkpoint_due` are
    what any rank asked for. `out_of_memory` is empty if memory sufficed. `bad_rows` are line
    numbers, empty if the loss is finite. `rank_seconds` are the seconds that each rank needed for
    its micro-batches.
    """

    loss: float
    stop: bool
    checkpoint_due: bool
    out_of_memory: str = ""
    bad_rows: tuple[int, ...] = ()
    metric_sums: tuple[float, ...] = ()
    rank_seconds: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        return not self.bad_rows


def agree(
    world: World, step: Step, train: Split, own: OwnMicroBatches, *, stop: bool, checkpoint_due: bool
) -> StepOutcome:
    """Join the outcomes of all ranks, which call it together.

    Every rank may see a request to stop; only rank 0 looks at its clock for checkpoints. The
    seconds of each rank are summed with zeros of the others. They come last, and the loss
    first, so that the loss is summed in the same order as without them.
    """
    total = sum(own.nll)
    bad = not math.isfinite(total)
    own_sums = [0.0] * len(own.metric_sums) if bad else own.metric_sums
    times = [own.seconds if rank == world.rank else 0.0 for rank in range(world.size)]
    flags = (float(bad), float(stop), float(checkpoint_due), float(bool(own.out_of_memory)))
    loss, any_bad, any_stop, any_due, any_out_of_memory, *rest = world.all_reduce_sum(
        0.0 if bad else total, *flags, *own_sums, *times
    )
    sums, rank_seconds = tuple(rest[: len(own_sums)]), tuple(rest[len(own_sums) :])
    if any_out_of_memory:
        message = _first_out_of_memory(world, own.out_of_memory)
        return StepOutcome(0.0, any_stop > 0, any_due > 0, out_of_memory=message)
    lines = _bad_rows(world, step.micro_batches[world.data_rank], train, own.nll) if any_bad else ()
    return StepOutcome(
        loss / step.label_tokens,
        any_stop > 0,
        any_due > 0,
        bad_rows=lines,
        metric_sums=sums,
        rank_seconds=rank_seconds,
    )


def _first_out_of_memory(world: World, own: str) -> str:
    messages = world.all_gather(own, str)
    return next(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message)


def _bad_rows(
    world: World, micro_batches: Sequence[Sequence[int]], train: Split, nll: Sequence[float]
) -> tuple[int, ...]:
    """The lines of the rows in all micro-batches, of any rank, whose loss isn't finite."""
    own = [
        train.line_number(example)
        for micro_batch, loss in zip(micro_batches, nll, strict=True)
        if not math.isfinite(loss)
        for example in micro_batch
    ]
    return tuple(sorted({line for lines in world.all_gather(own, list[int]) for line in lines}))
