"""Reads untrusted files: `python -m finetune_trainer.supervisor.inspection rows`, or `tokens`.

Rows, tokenizers and templates come from anywhere, and a few bytes of them may ask for any amount of
memory or time. Here, they cost only this process, and the supervisor lives to report it.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from finetune_trainer import limits
from finetune_trainer.errors import RunError, run_error_from
from finetune_trainer.paths import Paths
from finetune_trainer.supervisor.inspection import checks
from finetune_trainer.supervisor.inspection.messages import End, Order, Step

_BEAT_SECONDS = 1.0


class Reporter:
    """Sends messages to the supervisor, and knows what is being read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._last = 0.0
        self.reading_now = ("TrainingError", "the inputs")

    def send(self, message: Step | End) -> None:
        """Writes a message."""
        self._last = time.monotonic()
        self._stream.write(message.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n")

    def report(self, sentence: str) -> None:
        """Reports a sentence for the log."""
        self.send(Step(report=sentence))

    def reading(self, reason: str, subject: str) -> None:
        """Reports what is read from now on, and which reason stands for it."""
        self.reading_now = (reason, subject)
        self.send(Step(reason=reason, subject=subject))

    def beat(self) -> None:
        """Shows that the process makes progress. It is cheap; call it often."""
        if time.monotonic() - self._last > _BEAT_SECONDS:
            self.send(Step())


def main() -> int:
    """Runs one task. Every failure is reported, and ends with code 0 as well."""
    task = sys.argv[1]
    order = Order.model_validate_json(sys.stdin.buffer.read())
    reporter = Reporter(os.fdopen(os.dup(1), "wb", buffering=0))
    os.dup2(2, 1)  # what libraries print isn't a message
    paths = Paths(Path(order.run.scratch))
    with limits.more_memory_at_most(order.memory_bytes):
        try:
            end = _run(task, order, paths, reporter)
        except RunError as error:
            end = End(reason=error.reason, message=error.message)
        except BaseException as error:  # a library in Rust panics with one
            end = _unexpected(error, *reporter.reading_now)
    with suppress(OSError):
        reporter.send(end)
    return 0


def _run(task: str, order: Order, paths: Paths, reporter: Reporter) -> End:
    progress = checks.Progress(reporter.report, reporter.reading, reporter.beat)
    if task == "rows" or order.capacity is None:
        checks.check_rows(order.run, paths, progress)
        return End()
    counts, data = checks.check_tokens(order.run, paths, order.capacity, progress)
    return End(counts=counts, data=data)


def _unexpected(error: BaseException, reason: str, subject: str) -> End:
    """Returns what another exception than a RunError means for what was being read."""
    if isinstance(error, MemoryError):
        return End(reason=reason, message=f"{subject} needs too much memory to be read; check its content")
    if run_error_from(error).reason == "DiskFull":
        return End(reason="DiskFull", message=run_error_from(error).message)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return End(reason=reason, message=f"{subject} can't be read ({text})")


if __name__ == "__main__":
    sys.exit(main())
