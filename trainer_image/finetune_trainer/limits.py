"""Limits what reading untrusted input may cost this process: memory, and the time of one call.

Only memory of programs is limited, not mapped files: address space is reserved in large blocks by
PyTorch and Arrow, and says nothing about memory in use.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from finetune_trainer import host_memory

_LEAST_BYTES = 512 << 20
_MOST_BYTES = 4 << 30  # and as much as `_PER_FILE_BYTE` of the files adds
_PER_FILE_BYTE = 16
_USABLE = 0.75  # of free memory


class Overrun(BaseException):
    """Reports that a call took too long. It isn't an Exception, so no library hides it."""


def is_rust_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked. Its exception isn't an Exception, either."""
    return type(error).__module__ == "pyo3_runtime"


def memory_for(file_bytes: int, processes: int = 1) -> int:
    """Returns how many bytes one of the `processes` of this container may use to read files of this
    size.

    Rows are read one by one, and only a few numbers of each stay in memory.
    """
    free = int(host_memory.free_bytes(processes) * _USABLE)
    return max(_LEAST_BYTES, min(free, _MOST_BYTES + _PER_FILE_BYTE * file_bytes))


@contextmanager
def more_memory_at_most(size: int) -> Iterator[None]:
    """Makes allocations fail inside that would add more than `size` bytes to this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + size
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def limit_memory(size: int) -> None:
    """Makes allocations fail that would add more than `size` bytes to this process, until its
    end."""
    limit = _data_bytes() + size
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@contextmanager
def seconds_at_most(seconds: float) -> Iterator[None]:
    """Raises Overrun inside after some seconds.

    It interrupts Python code in the main thread only; in another thread it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def overrun(number: int, frame: FrameType | None) -> None:
        raise Overrun(f"it takes longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, overrun)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _data_bytes() -> int:
    """Returns what the kernel compares with RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)
