"""Defines Tracker, the interface of MLflow and Weights & Biases, and the worker that feeds one.

A worker reads rank 0's events file and retries until the server has everything. It may be as slow
as the server: nothing waits for it except, for a limited time, the supervisor at the end.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from finetune_api import untrusted
from finetune_api.base import LenientModel
from finetune_api.messages.run import RunConfig
from finetune_api.status import ArtifactStatus
from finetune_trainer.reporting import history
from finetune_trainer.reporting.event_reader import EventReader
from finetune_trainer.reporting.trackers.scalars import Point, points

State = Literal["recording", "failing", "done"]
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_BATCH_POINTS = 200
_STATUS = re.compile(r"error code (\d{3})\b")
_ANSWER = re.compile(r"\.?\s*response(?: body)?:", re.IGNORECASE)


class Ending(LenientModel):
    """Says how the attempt ended; the supervisor writes it to a file.

    `trained` is written before the upload of the result, the other values after it.
    """

    how: Literal["trained", "succeeded", "failed", "preempted"]
    message: str = ""
    artifact: ArtifactStatus | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """Describes what a tracker records. `folder` is for the tracker's own files."""

    run: RunConfig
    folder: Path


def small_files(export: Path) -> tuple[str, ...]:
    """Returns the paths of the result's files that describe it, without its weights."""
    candidates = (export / "README.md", export / "adapter_config.json", *sorted((export / "finetune").glob("*.*")))
    return tuple(str(path) for path in candidates if path.is_file())


class Tracker(Protocol):
    """Defines a client of a tracking server.

    Every method may raise anything and take any amount of time. The worker calls each of them again
    until it returns.
    """

    name: str
    ends_when: Literal["trained", "published"]

    def open(self) -> tuple[str, int]:
        """Starts or resumes the run. Returns its URL and the last step that it already contains."""
        ...

    def send(self, points: Sequence[Point]) -> None:
        """Records points, in the order of their steps."""
        ...

    def close(self, ending: Ending) -> str:
        """Ends the run. Returns a message for the log, which may be empty."""
        ...


@dataclass(frozen=True)
class WorkerContext:
    """Holds what the workers of an attempt share.

    `events` is rank 0's events file and `history` the content of history.jsonl up to the step from
    which this attempt resumed. `ending` returns how the attempt ended, or None while it runs.
    `report(tracker, state, message)` writes an event, and `redact` removes secrets from a text.
    """

    events: Path
    history: str
    ending: Callable[[], Ending | None]
    report: Callable[[str, State, str], None]
    redact: Callable[[str], str]


class Worker(threading.Thread):
    """Feeds one tracker from its own thread until the tracker has everything and is closed."""

    def __init__(self, make: Callable[[], Tracker], name: str, context: WorkerContext, *, tick: float = 1.0) -> None:
        super().__init__(name=name, daemon=True)
        self._make = make
        self._context = context
        self._reader = EventReader(context.events)
        self._tick = tick
        self._unsent = [point for line in history.parse(context.history) for point in points(line)]
        self._failing = False
        self._last_recorded_step = -1

    def run(self) -> None:
        """Sends points as they appear, and closes the tracker once the attempt has ended."""
        tracker: Tracker | None = None
        opened, retries = False, 0
        while True:
            ending = self._context.ending()  # before the last events are read
            self._unsent += [point for event in self._reader.read() for point in points(event)]
            try:
                tracker = tracker or self._make()
                if not opened:
                    url, self._last_recorded_step = tracker.open()
                    opened = True
                    self._report("recording", url)
                self._send(tracker)
                if self._failing:
                    self._failing = False
                    self._report("recording", "the server responds again")
                retries = 0
                if ending is not None and (ending.how != "trained" or tracker.ends_when == "trained"):
                    self._report("done", self._context.redact(tracker.close(ending)))
                    return
            except Exception as error:
                if not self._failing:
                    self._failing = True
                    self._report("failing", self._context.redact(described(error)))
                wait = _RETRY_SECONDS[min(retries, len(_RETRY_SECONDS) - 1)]
                retries += 1
                self._sleep(min(wait, 2.0) if ending is not None else wait, ending)
                continue
            self._sleep(self._tick, ending)

    def _report(self, state: State, message: str) -> None:
        self._context.report(self.name, state, message)

    def _send(self, tracker: Tracker) -> None:
        """Sends in batches, without the steps that an earlier attempt has already sent."""
        while self._unsent:
            batch = self._unsent[:_BATCH_POINTS]
            new = [
                point
                for point in batch
                if point.step > self._last_recorded_step or not any(n.startswith("train/") for n in point.values)
            ]
            if new:
                tracker.send(new)
            del self._unsent[: len(batch)]

    def _sleep(self, seconds: float, ending: Ending | None) -> None:
        """Sleeps, but wakes up as soon as the attempt ends."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (ending is not None or self._context.ending() is None):
            time.sleep(0.1)


def described(error: Exception) -> str:
    """Returns what went wrong, without what the server wrote: its address is the user's choice, and
    its answer could be a page that only this pod may read."""
    text = " ".join(str(error).split())
    is_answer = hasattr(error, "error_code") and "failed with exception" not in text
    if is_answer or _ANSWER.search(text):
        number = _STATUS.search(text)
        text = f"{getattr(error, 'error_code', '')}{f', HTTP status {number.group(1)}' if number else ''}".lstrip(", ")
    return untrusted.line(f"{type(error).__name__}: {text}", 300)
