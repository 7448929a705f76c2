"""Writes what a rank does to the events file that the supervisor tails.

A rank reports in no other way. Rank 0 reports everything; other ranks report only errors and their
node's checkpoints, so the training loop needs no `if rank == 0`. Every rank also touches a
heartbeat file next to its events file, by which each node's supervisor notices that a rank hangs.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from finetune_api.messages import events
from finetune_trainer.errors import RunError
from finetune_trainer.reporting import io_heartbeat

_REPEAT_SECONDS = 15
_HEARTBEAT_SECONDS = 1
_TRACEBACK_CHARACTERS = 4000


class EventWriter:
    """Appends one line per event, from any thread.

    A reader of complete lines never sees half of one.
    """

    def __init__(self, path: Path, rank: int, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._heartbeat_file = path.with_suffix(".alive")
        self._last_heartbeat = 0.0
        self._rank = rank
        self._clock = clock
        self._phase = self._detail = ""
        self._last_event = 0.0

    def report(self, kind: type[Any], **fields: Any) -> None:
        """Writes an event that rank 0 reports on behalf of all ranks; other ranks write nothing."""
        if self._rank == 0:
            self._write(kind(time=self._clock(), **fields))

    def report_of_node(self, kind: type[Any], **fields: Any) -> None:
        """Writes an event from any rank.

        The caller makes sure that one rank of each node does so.
        """
        self._write(kind(time=self._clock(), **fields))

    def phase(self, phase: str, detail: str = "") -> None:
        """Reports that a phase begins. `detail` is a sentence for people."""
        self._phase, self._detail = phase, detail
        self._heartbeat_file.write_text(phase)
        self.report(events.PhaseEvent, phase=phase, detail=detail)

    def heartbeat(self) -> None:
        """Shows that this rank is making progress. It is cheap; call it often.

        Rank 0 also repeats its phase after 15 seconds without an event, so that long work isn't
        mistaken for a stall.
        """
        now = self._clock()
        if now - self._last_heartbeat > _HEARTBEAT_SECONDS and self._heartbeat_file.exists():
            os.utime(self._heartbeat_file)
            self._last_heartbeat = now
        if self._rank == 0 and self._phase and now - self._last_event > _REPEAT_SECONDS:
            self.phase(self._phase, self._detail)

    def beating(self) -> AbstractContextManager[None]:
        """Returns a context in which moved data counts as progress. It is for blocks that load or
        write a model, which may take long on a slow disk."""
        self._heartbeat_file.touch()
        return io_heartbeat.beating(self.heartbeat)

    def decision(self, topic: str, choice: str, reason: str) -> None:
        """Reports a choice that is the same on all ranks."""
        self.report(events.DecisionEvent, topic=topic, choice=choice, reason=reason)

    def error(self, failed: RunError, error: BaseException) -> None:
        """Reports, from any rank, the error that ends it.

        `error` is the original exception. Its traceback is included unless it is `failed` itself.
        """
        stack = "" if error is failed else "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
        self._write(
            events.ErrorEvent(
                time=self._clock(), rank=self._rank, reason=failed.reason, message=failed.message, traceback=stack
            )
        )

    def _write(self, event: events.Event) -> None:
        self._last_event = self._clock()
        self._file.write(f"{events.encode(event)}\n".encode())
