"""Reads how much memory of this container is free, and how often a process was killed for memory.

It also releases memory that the C library retains. Never imports torch.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Cgroup = tuple[Path, Path, str]
# (limit, statistics, the statistic of memory in use by programs): cgroup v2, then v1.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.stat"), "total_rss"),
)
_SCARCE = 0.1  # of a limit
# The counter of kills in the container's own cgroup: v2, then v1.
_OOM_FILES = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_OOM_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def free_bytes(ranks: int) -> int:
    """Returns the bytes that are free for each of the `ranks` processes that share the container.

    Files in the page cache count as free.
    """
    return min(free for free, _ in _free_and_limit(CGROUPS)) // ranks


def is_scarce(cgroups: Sequence[Cgroup] = CGROUPS) -> bool:
    """Returns whether less than a tenth of the container's memory, or of its node's, is free."""
    return any(free < _SCARCE * limit for free, limit in _free_and_limit(cgroups))


def _free_and_limit(cgroups: Sequence[Cgroup]) -> list[tuple[int, int]]:
    """Returns the free bytes and all bytes of the node, and of the container if it has a limit."""
    meminfo = Path("/proc/meminfo")
    pairs = [(_read_number(meminfo, "MemAvailable:", unit=1024), _read_number(meminfo, "MemTotal:", unit=1024))]
    for limit, statistics, in_use in cgroups:
        try:
            text = limit.read_text().strip()
            if text.isdigit():
                pairs.append((int(text) - _read_number(statistics, in_use), int(text)))
        except OSError:
            continue
    return [(max(0, free), limit) for free, limit in pairs]


def release_unused() -> None:
    """Returns memory that the C library retains for reuse to the kernel.

    Until then the kernel counts it as in use. See `processes.allocator_environment` for why the
    library retains it.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if malloc_trim is not None:
        malloc_trim(0)


@contextmanager
def without_fragments() -> Iterator[None]:
    """Makes the C library return each large block to the kernel as soon as it is freed.

    By default, glibc raises the size from which it does so up to 32 MiB while a program frees
    blocks. Smaller ones then leave gaps in its heap, which stay in use for the kernel: a model that
    is split while it is loaded took up to three times its shard. Afterwards that size is glibc's
    highest. Nothing is changed if the environment sets glibc's allocation, as on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is None or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def oom_kills(files: tuple[Path, ...] = _OOM_FILES) -> int:
    """Returns how many processes were killed for memory since the container started; 0 if no file
    has the counter."""
    for file in files:
        try:
            match = _OOM_KILLS.search(file.read_text())
        except OSError:
            continue
        if match:
            return int(match.group(1))
    return 0


def _read_number(path: Path, name: str, unit: int = 1) -> int:
    """Returns the value of the line `name value` in a file, times `unit`; 0 without such a line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) * unit for line in lines if line and line[0] == name), 0)
