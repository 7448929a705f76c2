"""Runs the tests: `python -m testrun [pytest options]`.

Four groups run in parallel if memory permits: tests that wait until Kubernetes gives up a node,
tests that wait for containers, tests that wait for an API server, and tests that compute. All but
the first use several processes. Each line of output begins with its group. The failures are shown
again at the end, and the last line has the totals of all groups.

A few failed tests run once more, alone, when all others have ended: tests on a real cluster can
fail because the machine is busy. One that passes then counts as passed, but it is named, with its
first failure, and counted in the last line: it has a fault that needs mending.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from steps.checks import available_memory
from steps.runner import heed_interrupts
from testrun.groups import Group, Outcome, divide, entries, failures, is_summary, last_failed, once_more, read, waves

ROOT = Path(__file__).resolve().parents[2]
_FAILED, _NO_TESTS = 1, 5  # pytest's exit codes if tests failed, and if the options select none


def main(options: list[str]) -> int:
    """Returns 0 if every test passed."""
    if options and options[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    begin = time.monotonic()
    available = available_memory(Path("/proc/meminfo").read_text())
    total, broken, failed = Outcome(), False, list[str]()
    with tempfile.TemporaryDirectory(prefix="testrun-") as folder:
        for wave in waves(divide(entries(ROOT / "tests")), available):
            runs = [_Run(group, options, Path(folder)) for group in wave]
            for run, code in zip(runs, _wait(runs), strict=True):
                outcome, complete = run.conclude(code)
                broken |= not complete
                total += outcome
                failed += last_failed(run.cache)
        if once_more(total, failed) and not broken:
            print(f"\nOnce more, alone: {', '.join(failed)}", flush=True)
            run = _Run(Group("again", tuple(failed)), options, Path(folder))
            (code,) = _wait([run])
            outcome, complete = run.conclude(code)
            total = total.after(outcome) if complete else total
    print(total.line(time.monotonic() - begin), flush=True)
    return 1 if broken or total.failed or total.errors or not total.passed else 0


class _Run:
    """One run of pytest; its output goes to a file and, line by line, to the screen."""

    def __init__(self, group: Group, options: list[str], folder: Path) -> None:
        self.group = group
        self.report, self.output = folder / f"{group.name}.xml", folder / f"{group.name}.log"
        self.cache = folder / f"{group.name}-cache"
        output = ["-o", f"cache_dir={self.cache}", f"--junitxml={self.report}"]
        command = [sys.executable, "-m", "pytest", *group.paths, *group.options, *output, *options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=lambda: _prepare(group.niceness),
        )
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def wait(self) -> int:
        """Waits for the end. Returns pytest's exit code."""
        code = self.process.wait()
        self._thread.join()
        return code

    def conclude(self, code: int) -> tuple[Outcome, bool]:
        """Shows the failures. Returns the counted results, and whether pytest came to its end."""
        if text := failures(self.output.read_text(errors="replace")) if code else "":
            print(f"\n{text}")
        if code == _NO_TESTS:
            return Outcome(), True
        outcome = read(self.report)
        complete = code in (0, _FAILED) and outcome is not None
        if not complete:
            lack = "" if outcome else " and left no report"
            print(f"{self.group.name}: pytest ended with exit code {code}{lack}")
        return outcome or Outcome(), complete

    def _copy(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        shown = True
        with self.output.open("w") as log:
            for line in stream:
                log.write(line)
                log.flush()
                shown = shown and not is_summary(line)
                if shown:
                    _show(sys.stdout, self.group.name, line)


def _prepare(niceness: int) -> None:
    """Sets the niceness of a new session.

    Linux compares its processes only with each other, and the session with others by a niceness of
    its own.
    """
    heed_interrupts()
    os.nice(niceness)
    with suppress(OSError):  # a kernel without groups by session, which compares processes
        Path("/proc/self/autogroup").write_text(str(niceness))


_screen = threading.Lock()


def _show(out: TextIO, name: str, line: str) -> None:
    with _screen:
        out.write(f"{name:<8}{line}")
        out.flush()


def _wait(runs: list[_Run]) -> list[int]:
    """Waits for all runs. Ctrl-C is passed on once, so that the tests' fixtures clean up."""
    try:
        return [run.wait() for run in runs]
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for run in runs:
            run.process.send_signal(signal.SIGINT)
        return [run.wait() for run in runs]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
