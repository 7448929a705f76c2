"""Has untrusted files read by another process, and reports what that process can't report itself:
that it was killed, or that it never ends."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from finetune_api import untrusted
from finetune_api.messages.run import RunConfig
from finetune_api.reasons import REASONS
from finetune_api.spec.environment import is_credential
from finetune_api.status import DataStatus
from finetune_trainer import limits
from finetune_trainer.errors import RunError
from finetune_trainer.model_folder import Capacity
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.event_reader import last_lines
from finetune_trainer.supervisor.download import Report
from finetune_trainer.supervisor.inspection.messages import End, Order, Step, Task
from finetune_trainer.supervisor.processes import die_with_parent

_COMMAND = (sys.executable, "-m", "finetune_trainer.supervisor.inspection")
_MAX_LINE_BYTES = 4 << 20
_QUIET_SECONDS = (120, 300)  # without progress: at least, at most
_BASE_SECONDS = 600.0
_BYTES_PER_SECOND = 5_000  # of files, which may be compressed


@dataclass(frozen=True)
class Patience:
    """Holds how long the process may take in all, and how long without progress, in seconds."""

    deadline: float
    quiet: float

    @classmethod
    def of(cls, run: RunConfig, file_bytes: int) -> Patience:
        """Returns the limits for files of this size."""
        least, most = _QUIET_SECONDS
        return cls(_BASE_SECONDS + file_bytes / _BYTES_PER_SECOND, max(least, min(run.stall_seconds or most, most)))


@dataclass(frozen=True)
class Inspection:
    """Reads the inputs of a run. `environment` is that of the supervisor; the process gets no
    credentials of it. `reading` receives the name of what is read from now on. `memory_bytes` and
    `patience` have defaults that depend on the files."""

    run: RunConfig
    paths: Paths
    environment: Mapping[str, str] = field(repr=False)
    report: Report
    memory_bytes: int | None = None
    patience: Patience | None = None
    reading: Callable[[str], None] = lambda subject: None

    def rows(self) -> None:
        """Checks the rows without a tokenizer. Raises RunError, as `checks.check_rows` does."""
        self._end_of("rows")

    def tokens(self, capacity: Capacity) -> tuple[str, DataStatus]:
        """Checks the rows as tokens, for a model with this capacity.

        Raises RunError, as `checks.check_tokens` does.
        """
        end = self._end_of("tokens", capacity)
        return end.counts, end.data or DataStatus()

    def _end_of(self, task: Task, capacity: Capacity | None = None) -> End:
        size = sum(path.stat().st_size for path in self.paths.data("train").parent.rglob("*") if path.is_file())
        memory = self.memory_bytes or limits.memory_for(size)
        order = Order(run=self.run, memory_bytes=memory, capacity=capacity)
        log = self.paths.scratch / "logs" / "inspection.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            process = subprocess.Popen(
                (*_COMMAND, task),
                env=_environment(self.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                preexec_fn=die_with_parent,  # safe after a fork: one system call, by a loaded library
            )
        try:
            with suppress(OSError):
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
            end = self._listen(process, order, self.patience or Patience.of(self.run, size))
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if end.reason:
            reason = end.reason if end.reason in REASONS else "TrainingError"
            raise RunError(reason, untrusted.line(end.message, 4 * untrusted.MAX_LINE_CHARACTERS))
        return end

    def _listen(self, process: subprocess.Popen[bytes], order: Order, patience: Patience) -> End:
        assert process.stdin is not None  # noqa: S101 (both are pipes)
        assert process.stdout is not None  # noqa: S101
        with suppress(BrokenPipeError):
            process.stdin.write(order.model_dump_json(by_alias=True).encode())
            process.stdin.close()
        reason, subject = "TrainingError", ""
        lines = _Lines(process.stdout.fileno(), patience)
        for line in lines:
            message = _parsed(line)
            if isinstance(message, End):
                return message
            if message.report:
                self.report(message.report)
            if message.reason:
                reason, subject = message.reason, message.subject
                self.reading(subject)
        if lines.overdue:
            what = subject or "reading the inputs"
            return End(reason=reason, message=f"{what} {lines.overdue}; check its content, or use less of it")
        code = process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not subject:
            log = self.paths.scratch / "logs" / "inspection.log"
            why = f"the process that reads the inputs ended before it began ({how}): {last_lines(log)[-400:]}"
            return End(reason="TrainingError", message=why)
        limit = f"{order.memory_bytes / 2**30:.1f} GiB"
        return End(
            reason=reason,
            message=f"{subject} ends the process that reads it ({how}); it may need more than {limit} of memory, so "
            "check its content",
        )


class _Lines:
    """Iterates over the lines of a pipe, until it ends or the patience does. Then `overdue` says
    why."""

    def __init__(self, descriptor: int, patience: Patience) -> None:
        self._descriptor = descriptor
        self._patience = patience
        self._pending = b""
        self._ended = False
        self._deadline = time.monotonic() + patience.deadline
        self.overdue = ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                left = max(0.0, min(self._deadline - time.monotonic(), self._patience.quiet))
                if len(self._pending) > _MAX_LINE_BYTES or not selector.select(left):
                    self.overdue = self._why()
                    raise StopIteration
                data = os.read(self._descriptor, 1 << 16)
                if not data:
                    raise StopIteration
                self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _why(self) -> str:
        if time.monotonic() >= self._deadline:
            return f"takes longer than {self._patience.deadline:.0f} s"
        return f"takes longer than {self._patience.quiet:.0f} s without progress"


def _parsed(line: bytes) -> Step | End:
    for kind in (End, Step):
        with suppress(ValidationError):
            return kind.model_validate_json(line)
    return Step()


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables without credentials. One thread is enough for what numpy computes, and
    Arrow then reserves no memory in advance."""
    return {
        **{key: value for key, value in environment.items() if not is_credential(key)},
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
