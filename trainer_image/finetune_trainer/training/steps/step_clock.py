"""Measures how long the parts of a training step take.

On a GPU, the host only queues work: the time in which it queues a forward pass says nothing about
the forward pass. There, events in the GPU's queue measure the time between them. They are read when
they have passed, without waiting for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class StepClock(Protocol):
    """Measures the parts of one step after another."""

    def start(self) -> None:
        """Begins a step. Laps of an earlier step whose seconds weren't asked for are dropped."""

    def lap(self, part: str) -> None:
        """Adds the time since the last lap, or since the start, to `part`."""

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by part, and those since the start as `total`."""


class Event(Protocol):
    """A mark in a GPU's queue; torch.cuda.Event with timing."""

    def record(self) -> Any:
        """Puts the mark behind everything that is queued."""

    def query(self) -> bool:
        """Returns whether the GPU has reached it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Returns the milliseconds between two marks that the GPU has reached."""


def of_device(device: torch.device) -> StepClock:
    """Returns the clock for steps that are computed on `device`."""
    return CudaClock(_event) if device.type == "cuda" else HostClock()


def _event() -> Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class HostClock:
    """Measures wall time, which is the time of the work if the host itself computes."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return {**self._parts, "total": time.perf_counter() - self._start}


class CudaClock:
    """Measures the time between marks in the GPU's queue: what the GPU needs for a part, including
    the time for which it waits for the host.

    The GPU hasn't reached the last marks of a step when the step ends, usually those of the
    optimizer. They are read with the next step, so that part is the one of the step before. `total`
    is wall time.
    """

    def __init__(self, event: Callable[[], Event]) -> None:
        self._event = event
        self._unread: list[tuple[str, Event, Event]] = []
        self.start()

    def start(self) -> None:
        self._start = time.perf_counter()
        self._laps: list[tuple[str, Event, Event]] = []
        self._last = self._mark()

    def lap(self, part: str) -> None:
        mark = self._mark()
        self._laps.append((part, self._last, mark))
        self._last = mark

    def seconds(self) -> dict[str, float]:
        parts: dict[str, float] = {}
        laps = [*self._unread, *self._laps]
        passed = next((index for index, (_, _, end) in enumerate(laps) if not end.query()), len(laps))
        for part, begin, end in laps[:passed]:
            parts[part] = parts.get(part, 0.0) + begin.elapsed_time(end) / 1e3
        self._unread, self._laps = laps[passed:], []
        return {**parts, "total": time.perf_counter() - self._start}

    def _mark(self) -> Event:
        event = self._event()
        event.record()
        return event
