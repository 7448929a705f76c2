"""The processes that train together: who this rank is, and the few things that all of them say to each other.

Opened once by `rank`. Works the same for one process, so nobody asks whether there are others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune_trainer.failure import Failed


@dataclass(frozen=True)
class World:
    """As torchrun counts. `device` is where this rank's tensors live."""

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
    def ranks_here(self) -> range:
        """Of this node."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.barrier()

    def total(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def everyones(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def firsts(self, value: Any) -> Any:
        """Rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def from_environment(environ: Mapping[str, str], device: str) -> World:
    """Reads what torchrun, or our supervisor, sets."""
    try:
        rank, local_rank, size, local_size = (
            int(environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        )
    except (KeyError, ValueError) as error:
        raise Failed("InvalidConfig", f"the environment lacks what torchrun sets: {error}") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise Failed(
            "InvalidConfig",
            "world.device is cuda, but this pod can use no GPU; check the node's driver, or remove resources.gpu",
        )
    return World(rank, local_rank, size, local_size, torch.device("cuda", local_rank) if device == "cuda" else _CPU)


def join(world: World, *, expected: int, timeout: timedelta) -> None:
    """Meets the other ranks at MASTER_ADDR. gloo for the CPU, NCCL for tensors on GPUs."""
    if world.size != expected:
        raise Failed("InvalidConfig", f"WORLD_SIZE is {world.size}, but nodes * processesPerNode is {expected}")
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout)


def leave(world: World) -> None:
    """Ends the process group together; without it a rank aborts at exit."""
    world.wait()
    dist.destroy_process_group()


_CPU = torch.device("cpu")
