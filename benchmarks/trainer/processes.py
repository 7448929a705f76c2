"""Starts measured processes and watches their memory. Used by `ours` and `peers`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer import allocator

EVERY = 0.1  # seconds between looks at a process's memory


@dataclass(frozen=True)
class Peak:
    """Bytes. `rss` is the kernel's high-water mark (VmHWM): it counts mapped weights that were read, no page cache.

    `anonymous` is the most that was seen of memory that belongs to the process alone.
    """

    rss: int
    anonymous: int


@dataclass(frozen=True)
class Ended:
    """Codes and peaks by process."""

    codes: tuple[int, ...]
    peaks: tuple[Peak, ...]
    seconds: float

    @property
    def rss(self) -> int:
        return sum(peak.rss for peak in self.peaks)


def environment(threads: int, *, device: str = "cpu", keeps_memory: bool = False) -> dict[str, str]:
    """What every system gets: so many threads, no network, this machine's own settings otherwise.

    `keeps_memory`: and glibc's settings that our supervisor gives to ranks on the CPU.
    """
    return {
        **os.environ,
        **(allocator.environment(device, os.environ) if keeps_memory else {}),
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
    """Runs processes side by side to their end. They are killed, with what they started, after `timeout` seconds."""
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
    """The end of a log, for a row that tells an error."""
    return log.read_text(errors="replace")[-characters:] if log.is_file() else ""


def room() -> int:
    """Bytes that a peer's process may take: nine tenths of what is available now."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 * 9 // 10
    raise OSError("/proc/meminfo names no MemAvailable")
