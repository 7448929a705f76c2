"""Measures the network between nodes at the start of a run, with one all-reduce.

Bandwidth is that of nccl-tests: a ring moves 2 (n - 1) / n of the message through the network of
each node (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md, "bus bandwidth").
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from finetune_trainer.parallel.world import World

_BYTES = {"cuda": 128 << 20, "cpu": 4 << 20}
SPLIT_STRATEGIES = ("fsdp", "zero3")
"""With these strategies, weights are gathered through the network in every micro-batch."""
SLOW = 20e9  # bytes per second; less makes split weights wait for the network most of the time
_TRANSPORT = re.compile(r"\bUsing network (?P<name>\S.*?)\s*$", re.M)


@dataclass(frozen=True)
class Bandwidth:
    """What an all-reduce of all ranks reached.

    `message_bytes` took `seconds` on `ranks` ranks. `backend` is NCCL or gloo, `transport` is what
    NCCL uses between nodes, such as IB or Socket; empty if it isn't known.
    """

    message_bytes: int
    seconds: float
    ranks: int
    backend: str
    transport: str = ""

    @property
    def bytes_per_second(self) -> float:
        """What each node sends and receives per second."""
        return self.message_bytes * 2 * (self.ranks - 1) / self.ranks / self.seconds

    @property
    def choice(self) -> str:
        """The measured value, as a decision."""
        name = f"{self.backend} over {self.transport}" if self.transport else self.backend
        return f"{self.bytes_per_second / 1e9:.3g} GB/s by {name}"

    @property
    def reason(self) -> str:
        """How it was measured."""
        size = f"{self.message_bytes >> 20} MiB"
        return f"an all-reduce of {size} on {self.ranks} ranks took {self.seconds * 1e3:.3g} ms"

    def warning(self, strategy: str) -> str:
        """Returns what is wrong with this network for a strategy; empty if nothing is."""
        if strategy not in SPLIT_STRATEGIES or self.bytes_per_second >= SLOW:
            return ""
        return (
            f"distribution.strategy={strategy} sends the weights through the network for every micro-batch, and the "
            f"network between the nodes reaches {self.choice}, less than {SLOW / 1e9:.0f} GB/s. Request RDMA devices "
            "by resources.extra and name them by NCCL_IB_HCA in pod.env, use fewer nodes, or use ddp or zero2 if the "
            "model fits"
        )


def measure(world: World, log: Path | None = None) -> Bandwidth:
    """Times an all-reduce. All ranks call it together.

    The first one, which opens the connections, isn't timed. It draws no random numbers, and its
    memory is free afterwards. `log` is NCCL's log, which names the transport.
    """
    device = world.device.type
    message = torch.zeros(_BYTES[device] // 4, dtype=torch.float32, device=world.device)
    dist.all_reduce(message)
    _wait(world)
    began = time.perf_counter()
    dist.all_reduce(message)
    _wait(world)
    seconds = time.perf_counter() - began
    size = message.numel() * message.element_size()
    del message
    if device == "cuda":
        torch.cuda.empty_cache()
    backend = "NCCL" if device == "cuda" else "gloo"
    return Bandwidth(size, seconds, world.size, backend, transport(log) if device == "cuda" else "")


def transport(log: Path | None) -> str:
    """Returns what NCCL's log says that it uses between nodes; empty if it doesn't."""
    try:
        match = _TRANSPORT.search(log.read_text(errors="replace")) if log is not None else None
    except OSError:
        return ""
    return match.group("name") if match else ""


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    else:
        world.barrier()
