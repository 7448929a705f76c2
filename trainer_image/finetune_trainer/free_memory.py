"""How much memory a rank may still take: of its GPU, or its share of the container's. Read once by `assembly`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from finetune_trainer.scale import Room
from finetune_trainer.world import World

# (limit, statistics, what programs hold in them): the unified hierarchy, then the older one.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.stat"), "total_rss"),
)


def room(world: World) -> Room:
    """The least that any rank has, so that all decide alike."""
    host = free_bytes(torch.device("cpu"), world.local_size)
    free = free_bytes(world.device, world.local_size)
    everyones = world.everyones((free, host))
    return Room(
        "cuda" if world.device.type == "cuda" else "cpu",
        min(free for free, _ in everyones),
        min(h for _, h in everyones),
    )


def free_bytes(device: torch.device, ranks: int) -> int:
    """`ranks` share the container. Files in the page cache count as free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _number(Path("/proc/meminfo"), "MemAvailable:", unit=1024)
    for limit, statistics, held in _CGROUPS:
        try:
            text = limit.read_text().strip()
            if text.isdigit():
                free = min(free, int(text) - _number(statistics, held))
        except OSError:
            continue
    return max(0, free) // ranks


def give_back() -> None:
    """To the kernel, what the C library keeps for later (see `allocator`): it counts as taken."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _number(path: Path, name: str, unit: int = 1) -> int:
    """The value of a `name value` line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) * unit for line in lines if line and line[0] == name), 0)
