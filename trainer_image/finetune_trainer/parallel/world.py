"""Describes the processes that train together: this rank's number, and the operations that all
ranks share.

A world of one process works the same way, so it needs no special treatment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from finetune_trainer.data.batching.sequence_part import WHOLE, SequencePart
from finetune_trainer.errors import RunError
from finetune_trainer.parallel import gpu_access, messages

LOOPBACK = "127.0.0.1"
COLLECTIVE_TIMEOUT = timedelta(minutes=60)
"""How long a collective waits for another rank; the supervisor's stall timeout is shorter."""


@dataclass(frozen=True)
class World:
    """Holds the numbers of this rank and of all ranks, as torchrun counts them. `device` is for its
    tensors. `sequence` is the part of each packed row that this rank computes."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    sequence: SequencePart = WHOLE

    @property
    def data_size(self) -> int:
        """The number of groups of ranks among which the rows of a step are divided. The ranks of a
        group share each row; usually, a group is one rank."""
        return self.size // self.sequence.size

    @property
    def data_rank(self) -> int:
        """The number of this rank's group."""
        return self.rank // self.sequence.size

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

    def all_gather(self, value: Any, kind: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order. `kind` is their type.

        Raises RunError PeerLost if another rank sends something else.
        """
        message = messages.encode(value, kind)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(message)]))
        lengths = [int(size) for size in sizes]
        for length in lengths:
            messages.check_size(length)
        parts = [torch.zeros(max(lengths), dtype=torch.uint8) for _ in range(self.size)]
        own = torch.zeros(max(lengths), dtype=torch.uint8)
        own[: len(message)] = _bytes(message)
        dist.all_gather(parts, own)
        return [
            messages.decode(part[:length].numpy().tobytes(), kind) for part, length in zip(parts, lengths, strict=True)
        ]

    def broadcast(self, value: Any, kind: Any) -> Any:
        """Returns rank 0's value on every rank. `kind` is its type.

        Raises RunError PeerLost if rank 0 sends something else.
        """
        message = messages.encode(value, kind) if self.is_first else b""
        size = torch.tensor([len(message)])
        dist.broadcast(size, src=0)
        messages.check_size(int(size))
        data = _bytes(message) if self.is_first else torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(data, src=0)
        return value if self.is_first else messages.decode(data.numpy().tobytes(), kind)


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
    GPUs. From then on, PyTorch's object collectives fail in this process.

    Raises RunError if the world size isn't the expected one.
    """
    if world.size != expected:
        raise RunError("InvalidConfig", f"WORLD_SIZE is {world.size}, but nodes * processesPerNode is {expected}")
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    messages.refuse_pickles()
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    own_store = store(world, timeout)
    if own_store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=own_store, rank=world.rank, world_size=world.size)


def store(world: World, timeout: timedelta) -> Store | None:
    """Returns the store of the rendezvous if MASTER_ADDR is the loopback address, and None if it is
    another one, or if torchrun has the store.

    PyTorch's own store would listen on all addresses of the pod, and it authenticates nobody.
    """
    if os.environ.get("MASTER_ADDR") != LOOPBACK or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    if not world.is_first:
        return TCPStore(LOOPBACK, port, world.size, is_master=False, timeout=timeout)
    listener = socket.create_server((LOOPBACK, port), backlog=socket.SOMAXCONN)
    return TCPStore(
        LOOPBACK, port, world.size, is_master=True, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def leave(world: World) -> None:
    """Ends the process group on all ranks together; otherwise, a rank would abort at exit."""
    world.barrier()
    dist.destroy_process_group()


def _bytes(message: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


_CPU = torch.device("cpu")
