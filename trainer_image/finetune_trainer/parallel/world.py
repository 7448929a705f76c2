"""Describes the processes that train together: this rank's number, and the operations that all
ranks share.

A world of one process works the same way, so it needs no special treatment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune_trainer.errors import RunError
from finetune_trainer.parallel import gpu_access

COLLECTIVE_TIMEOUT = timedelta(minutes=60)
"""How long a collective waits for another rank; the supervisor's stall timeout is shorter."""


@dataclass(frozen=True)
class World:
    """Holds the numbers of this rank and of all ranks, as torchrun counts them. `device` is for its
    tensors."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        return self.local_rank == 0

    @property
    def node_ranks(self) -> range:
        """The ranks on this rank's node."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)

    def barrier(self) -> None:
        """Waits until all ranks have called it."""
        dist.barrier()

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Returns each value summed over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def from_environment(environ: Mapping[str, str], device: str) -> World:
    """Reads the world from the environment variables that torchrun or the supervisor sets.

    Raises RunError if one is missing or invalid, or if the device is cuda and this rank has no GPU
    that it can use.
    """
    try:
        rank, local_rank, size, local_size = (
            int(environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        )
    except (KeyError, ValueError) as error:
        raise RunError("InvalidConfig", f"torchrun's environment variables are missing or invalid: {error}") from None
    if device == "cuda":
        gpu_access.require(local_rank)
    return World(rank, local_rank, size, local_size, torch.device("cuda", local_rank) if device == "cuda" else _CPU)


def join(world: World, *, expected: int, timeout: timedelta) -> None:
    """Joins the other ranks at MASTER_ADDR, with gloo for tensors on the CPU and NCCL for those on
    GPUs.

    Raises RunError if the world size isn't the expected one.
    """
    if world.size != expected:
        raise RunError("InvalidConfig", f"WORLD_SIZE is {world.size}, but nodes * processesPerNode is {expected}")
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout)


def leave(world: World) -> None:
    """Ends the process group on all ranks together; otherwise, a rank would abort at exit."""
    world.barrier()
    dist.destroy_process_group()


_CPU = torch.device("cpu")
