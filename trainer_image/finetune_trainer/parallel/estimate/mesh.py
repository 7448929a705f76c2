"""Decides how many copies of the model the nodes of an fsdp run hold, and says why.

A mesh of one dimension shards one copy over all ranks. A mesh of two dimensions has a copy on every
node, sharded over that node's ranks, so that weights aren't gathered through the network between
nodes. This module is pure.
"""

from __future__ import annotations

from finetune_api.spec.hardware import Offload, Strategy
from finetune_trainer.parallel.memory_estimate import TrainingSetup


def replica_counts(
    setup: TrainingSetup, strategy: Strategy, offload: Offload, saved: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """Returns how many copies of the model may be trained, the largest number first.

    `saved` is the mesh of the checkpoint that the run resumes from: its copies, and the ranks that
    share one. It is kept if this run can have it, so that sums are rounded alike.
    """
    possible = setup.nodes if strategy == "fsdp" and not obstacle(setup, offload) else 1
    if strategy == "fsdp" and saved is not None and keeps(setup, possible, saved):
        return (saved[0],)
    return (possible, 1) if possible > 1 else (1,)


def keeps(setup: TrainingSetup, possible: int, saved: tuple[int, int]) -> bool:
    """Returns whether a run that may have `possible` copies can have the mesh of a checkpoint."""
    return saved[0] in (1, possible) and saved[0] * saved[1] == setup.ranks


def obstacle(setup: TrainingSetup, offload: Offload) -> str:
    """Returns why a copy on every node is out of the question; empty if it isn't."""
    if setup.nodes == 1:
        return "there is one node"
    if setup.ranks_per_node == 1:
        return "each node has one process, which would have to hold the whole model"
    if offload != "none":
        return "what is offloaded is sharded over the hosts of all nodes"
    return ""
