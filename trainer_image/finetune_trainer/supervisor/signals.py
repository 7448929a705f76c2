"""Turns SIGTERM and SIGINT into a request to stop, which knows how much time is left.

A second signal means that no time is left.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class StopRequest:
    """Counts the signals, and measures the time that is left.

    `grace` is the time in seconds from the first signal until everything must be written.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._first: float | None = None
        self.count = 0

    def install(self) -> None:
        """Installs the signal handlers. It must run in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._first is None:
            self._first = time.monotonic()

    @property
    def requested(self) -> bool:
        """True after the first signal."""
        return self.count > 0

    @property
    def seconds_left(self) -> float:
        """Seconds until everything must be written: infinity before a signal, 0 after a second."""
        if self._first is None:
            return float("inf")
        if self.count > 1:
            return 0.0
        return max(0.0, self._first + self._grace - time.monotonic())


def in_thread(work: Callable[[], T], waiting: Callable[[], None], tick: float) -> T:
    """Runs `work` in a thread and returns its result.

    Meanwhile `waiting` is called every `tick` seconds; it may raise to abandon the work.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    try:
        while True:
            try:
                return future.result(timeout=tick)
            except TimeoutError:
                if future.done():
                    raise  # the work raised it
            waiting()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
