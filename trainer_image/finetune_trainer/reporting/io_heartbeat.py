"""Beats while this process moves data, so that a slow disk isn't mistaken for a rank that hangs.

Loading or writing a model is one call of another library that can take many minutes. A thread
looks at what the kernel counts for this process. A rank that waits for another one moves no data,
even if it spins, so it still counts as stalled.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 1.0
MIN_BYTES = 1 << 20  # per interval; logs and this thread itself cause less
_PROCESS = Path("/proc/self")
_COUNTED = ("rchar", "wchar", "read_bytes", "write_bytes")


@contextmanager
def beating(heartbeat: Callable[[], None]) -> Iterator[None]:
    """Calls `heartbeat` from a thread, once per second in which data moved, until the block
    ends."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(heartbeat, ended), name="io-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True)
class _Counts:
    """Holds what the kernel counts for this process, in bytes.

    `transferred` only grows: what was read, written, or touched in memory for the first time; some
    bytes count twice. `resident` is the memory in use, with the pages of files that are mapped.
    """

    transferred: int
    resident: int

    def moved_since(self, before: _Counts) -> int:
        """Returns a lower bound of the bytes that moved since an earlier count."""
        return self.transferred - before.transferred + abs(self.resident - before.resident)


def _count() -> _Counts:
    usage, page = resource.getrusage(resource.RUSAGE_SELF), resource.getpagesize()
    transferred = (usage.ru_minflt + usage.ru_majflt) * page
    with suppress(OSError):  # some sandboxes hide the file
        lines = dict(line.split(": ") for line in (_PROCESS / "io").read_text().splitlines())
        transferred += sum(int(lines[name]) for name in _COUNTED)
    return _Counts(transferred, int((_PROCESS / "statm").read_text().split()[1]) * page)


def _watch(heartbeat: Callable[[], None], ended: threading.Event) -> None:
    before = _count()
    while not ended.wait(INTERVAL_SECONDS):
        now = _count()
        if now.moved_since(before) >= MIN_BYTES:
            heartbeat()
        before = now
