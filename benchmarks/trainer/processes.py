"""Starts the measured processes and samples their memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.supervisor.processes import allocator_environment

EVERY = 0.1  # seconds between two samples of a process's memory


@dataclass(frozen=True)
class Peak:
    """The peak memory of a process, in bytes.

    `rss` is the kernel's high-water mark (VmHWM), which includes mapped weights that were read, but
    no page cache. `anonymous` is the largest sample of the process's own memory (RssAnon).
    """

    rss: int
    anonymous: int


@dataclass(frozen=True)
class Ended:
    """The exit codes and peak memory of processes, in their order, and their wall time."""

    codes: tuple[int, ...]
    peaks: tuple[Peak, ...]
    seconds: float

    @property
    def rss(self) -> int:
        """The sum of the processes' peaks, in bytes."""
        return sum(peak.rss for peak in self.peaks)


def environment(threads: int, *, device: str = "cpu", keeps_memory: bool = False) -> dict[str, str]:
    """Returns the environment of a measured process: so many threads and no network.

    `keeps_memory` adds the allocator settings that our supervisor sets for ranks on the CPU.
    Everything else is as on this machine.
    """
    return {
        **os.environ,
        **(allocator_environment(device, os.environ) if keeps_memory else {}),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]],
    *,
    log: Path,
    timeout: float,
    folder: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Ended:
    """Runs processes in parallel to their end, and calls `tick` meanwhile.

    After `timeout` seconds they are killed together with their children.
    """
    began = time.monotonic()
    with log.open("ab") as out:
        children = [
            subprocess.Popen(command, env=dict(env), stdout=out, stderr=out, cwd=folder, start_new_session=True)
            for command, env in commands
        ]
    peaks = [Peak(0, 0) for _ in children]
    try:
        while any(child.poll() is None for child in children):
            peaks = [_higher(peak, child.pid) for peak, child in zip(peaks, children, strict=True)]
            tick()
            if time.monotonic() - began > timeout:
                break
            time.sleep(EVERY)
    finally:
        for child in children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        codes = tuple(child.wait() for child in children)
    return Ended(codes, tuple(peaks), time.monotonic() - began)


def _higher(peak: Peak, pid: int) -> Peak:
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        rss, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))
    except (OSError, KeyError, IndexError, ValueError):
        return peak
    return Peak(max(peak.rss, rss), max(peak.anonymous, anonymous))


def tail(log: Path, characters: int = 600) -> str:
    """Returns the end of a log, for a row with an error."""
    return log.read_text(errors="replace")[-characters:] if log.is_file() else ""


def memory_limit() -> int:
    """Returns the bytes that a peer's process may allocate: 90 % of the available memory."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 * 9 // 10
    raise OSError("/proc/meminfo has no MemAvailable")
