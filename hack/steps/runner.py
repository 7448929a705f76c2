"""Runs the steps of a command, logs other programs' output, and records durations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from steps import timings
from steps.display import Line

_SHOWN_LINES = 20  # of the log, after a failure


@dataclass(frozen=True)
class Step:
    """One step of a command.

    `seconds` were measured on two idle cores; `parallel` (0 to 1) is the share of that time that
    shrinks with more cores. `is_done` tells whether nothing is left to do.
    """

    key: str
    title: str
    seconds: float
    parallel: float = 0.0
    is_done: Callable[[], bool] = lambda: False


class StepFailed(Exception):
    """A program of a step failed. The message is for users and names the log."""


class Steps:
    """The steps of one command, in order.

    `folder` contains NAME.log, the output of all programs, and NAME.json, the durations.
    """

    def __init__(self, name: str, steps: Sequence[Step], folder: Path, out: TextIO = sys.stderr) -> None:
        self._steps = {step.key: step for step in steps}
        self._name, self._out = name, out
        self._log, self._timings = folder / f"{name}.log", folder / f"{name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._log.write_text("")
        self._step_offset = 0
        last, cores = timings.load(self._timings), len(os.sched_getaffinity(0))
        self._expected = {
            step.key: 0.0
            if step.is_done()
            else last.get(step.key, timings.expected(step.seconds, step.parallel, cores))
            for step in steps
        }

    @property
    def log(self) -> Path:
        """The file with other programs' output."""
        return self._log

    def total(self) -> float:
        """Returns the seconds that all steps should take together."""
        return sum(self._expected.values())

    def overview(self) -> str:
        """Returns a line with the number of steps to do and how long they should take."""
        pending = sum(1 for seconds in self._expected.values() if seconds)
        return f"{pending} of {len(self._steps)} steps to do, about {timings.clock(self.total())}; log: {self._log}"

    @contextmanager
    def step(self, key: str, *, live: bool = True) -> Iterator[None]:
        """Shows a step while its body runs.

        Unless `live`, only the first and the last line are shown, so that the body can print.
        """
        step, number = self._steps[key], list(self._steps).index(key)
        later = sum(self._expected[name] for name in list(self._steps)[number + 1 :])
        title = f"{number + 1}/{len(self._steps)} {step.title}"
        self._step_offset = self._log.stat().st_size
        line = Line(self._out, title, self._expected[key], later, self._last_line)
        line.start(live=live)
        try:
            yield
        except BaseException as error:
            line.stop("✗", "stopped after" if isinstance(error, KeyboardInterrupt) else "failed after")
            raise
        seconds = line.stop("✓", "done in")
        if self._expected[key]:
            timings.save(self._timings, {key: seconds})

    def call_all(
        self,
        commands: Sequence[Sequence[str]],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> list[str]:
        """Runs programs in parallel; returns the standard output of each.

        If one fails, the others are stopped. Raises StepFailed with the end of the log.
        """
        with self._log.open("a") as log, ExitStack() as outputs:
            running: list[tuple[Sequence[str], subprocess.Popen[str], IO[str]]] = []
            try:
                for command in commands:
                    log.write(f"$ {' '.join(command)}\n")
                    log.flush()
                    output = outputs.enter_context(tempfile.TemporaryFile("w+"))
                    running.append((command, _start(command, environment, folder, output, log), output))
                while any(process.poll() is None for _, process, _ in running):
                    if any(process.poll() for _, process, _ in running):
                        break
                    time.sleep(0.1)
            finally:
                failed = [(command, code) for command, process, _ in running if (code := process.poll())]
                for _, process, _ in running:
                    if process.poll() is None:
                        _end(process)
            if failed:
                raise StepFailed(self._failure(*failed[0]))
            return [_content(output) for _, _, output in running]

    def call(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> str:
        """Runs a program with its standard error in the log; returns its standard output.

        Raises StepFailed with the end of the log.
        """
        (output,) = self.call_all([command], environment=environment, folder=folder)
        return output

    def _failure(self, command: Sequence[str], code: int) -> str:
        tail = self._log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        shown = "\n".join(f"    {line}" for line in tail)
        return f"`{' '.join(command)}` ended with exit code {code}; the end of {self._log}:\n{shown}"

    def _last_line(self) -> str:
        """Returns the last line that a program of this step wrote."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(self._step_offset, self._log.stat().st_size - 4096))
                lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")


def _start(
    command: Sequence[str], environment: Mapping[str, str] | None, folder: Path | None, output: IO[str], log: IO[str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=log,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """Lets SIGINT end this process again: a shell's background jobs inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _content(output: IO[str]) -> str:
    output.seek(0)
    return output.read().strip()


def _end(process: subprocess.Popen[str]) -> None:
    """Stops the program and its children: by SIGINT, then SIGTERM, then SIGKILL."""
    for number, seconds in ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
