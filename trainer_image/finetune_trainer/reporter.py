"""Where a rank says what it does: the events file that the supervisor tails. The only way out of a rank.

Rank 0 reports everything; other ranks only decisions of their own and errors, so the loop needs no `if rank == 0`.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any

from finetune_api import events
from finetune_trainer.failure import Failed


class Reporter:
    """Appends one line an event, whole or not at all for who reads complete lines."""

    def __init__(self, path: Path, rank: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._rank = rank

    def report(self, kind: type[Any], **fields: Any) -> None:
        """An event that rank 0 speaks of for all ranks."""
        if self._rank == 0:
            self._write(kind(time=time.time(), **fields))

    def phase(self, phase: str) -> None:
        self.report(events.PhaseEvent, phase=phase)

    def decision(self, topic: str, choice: str, reason: str) -> None:
        """A choice that all ranks made alike."""
        self.report(events.DecisionEvent, topic=topic, choice=choice, reason=reason)

    def error(self, failed: Failed, error: BaseException) -> None:
        """Any rank's last word."""
        told = "" if error is failed else "".join(traceback.format_exception(error))[-4000:]
        self._write(
            events.ErrorEvent(
                time=time.time(), rank=self._rank, reason=failed.reason, message=failed.message, traceback=told
            )
        )

    def _write(self, event: events.Event) -> None:
        self._file.write(f"{events.encode(event)}\n".encode())
