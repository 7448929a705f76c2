"""Divides a world into groups of ranks that share each packed row."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from finetune_trainer.data.batching.sequence_part import SequencePart
from finetune_trainer.errors import RunError
from finetune_trainer.parallel.world import COLLECTIVE_TIMEOUT, World


def members(ranks: int, size: int) -> list[list[int]]:
    """Returns the ranks of each group: consecutive ones, which are on the same node as far as
    possible. Raises RunError(InvalidConfig) if they can't be divided equally."""
    if ranks % size:
        raise RunError(
            "InvalidConfig",
            f"distribution.sequenceParallelSize {size} doesn't divide the {ranks} processes; use a divisor of their "
            "number",
        )
    return [list(range(first, first + size)) for first in range(0, ranks, size)]


def divide(world: World, size: int) -> World:
    """Returns the world with groups of `size` ranks, which must have joined. All ranks call it
    together."""
    groups = members(world.size, size)
    if size == 1:
        return world
    own, _ = dist.new_subgroups_by_enumeration(groups, timeout=COLLECTIVE_TIMEOUT)  # type: ignore[no-untyped-call]
    return replace(world, sequence=SequencePart(world.rank % size, size, own.group_name))
