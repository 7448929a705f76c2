"""Where a rank says what it does: the events file that the supervisor tails. The only way out of a rank.

Rank 0 reports everything; other ranks only errors and their node's checkpoints, so the loop needs no `if rank == 0`.
Every rank touches a file beside it while it gets on, so that each node's supervisor can tell when its ranks don't.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api import events
from finetune_trainer.failure import Failed

_SILENCE_SECONDS = 15
_BEAT_SECONDS = 1


class Reporter:
    """Appends one line an event, whole or not at all for who reads complete lines; any thread may."""

    def __init__(self, path: Path, rank: int, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._beats = path.with_suffix(".alive")
        self._beaten = 0.0
        self._rank = rank
        self._clock = clock
        self._phase = self._detail = ""
        self._last = 0.0

    def report(self, kind: type[Any], **fields: Any) -> None:
        """An event that rank 0 speaks of for all ranks."""
        if self._rank == 0:
            self._write(kind(time=self._clock(), **fields))

    def report_of_node(self, kind: type[Any], **fields: Any) -> None:
        """An event that one rank of each node speaks of, whoever calls."""
        self._write(kind(time=self._clock(), **fields))

    def phase(self, phase: str, detail: str = "") -> None:
        self._phase, self._detail = phase, detail
        self._beats.write_text(phase)
        self.report(events.PhaseEvent, phase=phase, detail=detail)

    def alive(self) -> None:
        """Says the phase again when nothing was said for a while: long work isn't a stall. Cheap; call it often."""
        now = self._clock()
        if now - self._beaten > _BEAT_SECONDS and self._beats.exists():
            os.utime(self._beats)
            self._beaten = now
        if self._rank == 0 and now - self._last > _SILENCE_SECONDS:
            self.phase(self._phase, self._detail)

    def decision(self, topic: str, choice: str, reason: str) -> None:
        """A choice that all ranks made alike."""
        self.report(events.DecisionEvent, topic=topic, choice=choice, reason=reason)

    def error(self, failed: Failed, error: BaseException) -> None:
        """Any rank's last word."""
        told = "" if error is failed else "".join(traceback.format_exception(error))[-4000:]
        self._write(
            events.ErrorEvent(
                time=self._clock(), rank=self._rank, reason=failed.reason, message=failed.message, traceback=told
            )
        )

    def _write(self, event: events.Event) -> None:
        self._last = self._clock()
        self._file.write(f"{events.encode(event)}\n".encode())
