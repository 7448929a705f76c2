"""Measures how long each phase of an attempt takes."""

from __future__ import annotations

import time


class PhaseClock:
    """Tracks the current phase, its message, and the seconds that were spent in each phase."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.message = ""
        self.seconds: dict[str, float] = {}
        """Seconds by phase, without the time since the current phase was entered."""
        self._entered = time.monotonic()

    def enter(self, phase: str, message: str = "") -> tuple[str, float]:
        """Enters a phase. Returns the previous phase and the seconds since that was entered."""
        now = time.monotonic()
        previous, elapsed = self.phase, now - self._entered
        self.seconds[previous] = self.seconds.get(previous, 0.0) + elapsed
        self._entered, self.phase, self.message = now, phase, message
        return previous, elapsed
