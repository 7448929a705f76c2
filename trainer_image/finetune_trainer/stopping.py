"""SIGTERM and SIGINT as a request to stop, with the time that is left. Installed once, by the door; read by the
supervisor's loop. A second signal means: now.
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
    """Counts the signals. `install` must run in the main thread."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._first: float | None = None
        self.count = 0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._first is None:
            self._first = time.monotonic()

    @property
    def asked(self) -> bool:
        return self.count > 0

    @property
    def left(self) -> float:
        """Seconds until everything must be written; unlimited until somebody asks, nothing after a second signal."""
        if self._first is None:
            return float("inf")
        if self.count > 1:
            return 0.0
        return max(0.0, self._first + self._grace - time.monotonic())


def in_thread(work: Callable[[], T], waiting: Callable[[], None], tick: float) -> T:
    """Does something slow; meanwhile `waiting` is called every `tick` seconds, and may raise to leave it alone."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    try:
        while True:
            try:
                return future.result(timeout=tick)
            except TimeoutError:
                if future.done():
                    raise  # the work's own
            waiting()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
