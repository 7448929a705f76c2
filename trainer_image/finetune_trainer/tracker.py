"""Tracker: what MLflow and Weights & Biases have in common, and the worker that feeds one of them.

A worker reads rank 0's events file and tries until the server has everything. It may be as slow as the server: nobody
waits for it but, for a bounded time, the supervisor at the end. Runs in `trackers`, a process of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from finetune_api.model import LenientModel
from finetune_api.run import RunConfig
from finetune_api.status import ArtifactStatus
from finetune_trainer import history
from finetune_trainer.scalars import Point, points
from finetune_trainer.tail import Tail

State = Literal["recording", "failing", "done"]
_WAITS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_AT_ONCE = 200  # points


class Ending(LenientModel):
    """How the attempt ended; the supervisor leaves it as a file. `trained` comes before the result's upload, the others
    after it."""

    how: Literal["trained", "succeeded", "failed", "preempted"]
    message: str = ""
    artifact: ArtifactStatus | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is recorded. `folder` is the tracker's own."""

    run: RunConfig
    folder: Path
    environment: Mapping[str, str]


def small_files(export: Path) -> tuple[str, ...]:
    """Of a result: what tells about it, not its weights."""
    wanted = (export / "README.md", export / "adapter_config.json", *sorted((export / "finetune").glob("*.*")))
    return tuple(str(path) for path in wanted if path.is_file())


class Tracker(Protocol):
    """Every method may raise anything and take for ever. Each is called again until it returns."""

    name: str
    ends_when: Literal["trained", "published"]

    def open(self) -> tuple[str, int]:
        """(where people see the run, the last step that it holds already)"""
        ...

    def send(self, points: Sequence[Point]) -> None: ...

    def close(self, ending: Ending) -> str:
        """What is worth telling about the end, or nothing."""
        ...


class Worker(threading.Thread):
    """`tell(state, message)` writes an event. `hide` takes secrets out of a text."""

    def __init__(
        self,
        make: Callable[[], Tracker],
        name: str,
        *,
        scratch_events: Path,
        earlier: str,
        ending: Callable[[], Ending | None],
        tell: Callable[[str, State, str], None],
        hide: Callable[[str], str],
        tick: float = 1.0,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._make = make
        self._tail = Tail(scratch_events)
        self._ending = ending
        self._tell = tell
        self._hide = hide
        self._tick = tick
        self._waiting = [found for line in history.parse(earlier, 2**62) for found in points(line)]
        self._failing = False
        self._held = -1

    @property
    def unsent(self) -> int:
        return len(self._waiting)

    def run(self) -> None:
        tracker: Tracker | None = None
        opened, tries = False, 0
        while True:
            ending = self._ending()  # before the last events are read
            self._waiting += [found for event in self._tail.read() for found in points(event)]
            try:
                tracker = tracker or self._make()
                if not opened:
                    where, self._held = tracker.open()
                    opened = True
                    self._tell(self.name, "recording", where)
                self._send(tracker)
                if self._failing:
                    self._failing = False
                    self._tell(self.name, "recording", "it answers again")
                tries = 0
                if ending is not None and (ending.how != "trained" or tracker.ends_when == "trained"):
                    self._tell(self.name, "done", self._hide(tracker.close(ending)))
                    return
            except Exception as error:
                if not self._failing:
                    self._failing = True
                    self._tell(self.name, "failing", self._hide(_short(error)))
                wait = _WAITS[min(tries, len(_WAITS) - 1)]
                tries += 1
                self._sleep(min(wait, 2.0) if ending is not None else wait, ending)
                continue
            self._sleep(self._tick, ending)

    def _send(self, tracker: Tracker) -> None:
        """Steps that an earlier attempt sent aren't sent again."""
        while self._waiting:
            batch = self._waiting[:_AT_ONCE]
            new = [p for p in batch if p.step > self._held or not any(n.startswith("train/") for n in p.values)]
            if new:
                tracker.send(new)
            del self._waiting[: len(batch)]

    def _sleep(self, seconds: float, ending: Ending | None) -> None:
        """Less, once the end has come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (ending is not None or self._ending() is None):
            time.sleep(0.1)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
