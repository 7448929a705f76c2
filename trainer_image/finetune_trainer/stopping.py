"""SIGTERM and SIGINT as a request to stop, with the time that is left. Installed once, by the door; read by the
supervisor's loop. A second signal means: now.
"""

from __future__ import annotations

import signal
import time
from types import FrameType


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
