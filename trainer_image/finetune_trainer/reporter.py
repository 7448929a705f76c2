"""Where a rank says what it does: the events file that the supervisor tails. The only way out of a rank.

Rank 0 reports everything; other ranks only decisions of their own and errors, so the loop needs no `if rank == 0`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api import events
from finetune_trainer.failure import Failed

_SILENCE_SECONDS = 15


class Reporter:
    """Appends one line an event, whole or not at all for who reads complete lines."""

    def __init__(self, path: Path, rank: int, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._rank = rank
        self._clock = clock
        self._phase = ""
        self._last = 0.0

    def report(self, kind: type[Any], **fields: Any) -> None:
        """An event that rank 0 speaks of for all ranks."""
        if self._rank == 0:
            self._write(kind(time=self._clock(), **fields))

    def phase(self, phase: str) -> None:
        self._phase = phase
        self.report(events.PhaseEvent, phase=phase)

    def alive(self) -> None:
        """Says the phase again when nothing was said for a while: long work isn't a stall. Cheap; call it often."""
        if self._clock() - self._last > _SILENCE_SECONDS:
            self.phase(self._phase)

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
