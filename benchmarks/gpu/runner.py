"""Runs a stage in its own process, with a time limit, and passes on its findings immediately."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.gpu.child import parsed
from benchmarks.gpu.results import Finding, StageEnd

_LOG_LINES = 25


def run(
    name: str,
    command: list[str],
    limit: float,
    environment: Mapping[str, str],
    out: Path,
    add: Callable[[Finding], None],
) -> StageEnd:
    """Runs a stage's command, calls `add` for each finding, and returns how the stage ended.

    After `limit` seconds the stage's process group is killed. Its log is written to `out`.
    """
    began = time.monotonic()
    log_path = out / f"{name}.log"
    child = subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        _kill(child)

    timer = threading.Timer(max(1.0, limit), expire)
    timer.start()
    last: deque[str] = deque(maxlen=_LOG_LINES)
    try:
        assert child.stdout is not None
        with log_path.open("w") as log:
            for line in child.stdout:
                finding = parsed(line)
                if finding is not None:
                    add(finding)
                    continue
                log.write(line)
                last.append(line.rstrip())
        code = child.wait()
    finally:
        timer.cancel()
        _kill(child)
    seconds = time.monotonic() - began
    if code == 0:
        return StageEnd(name, "done", round(seconds, 1))
    ended = f"stopped at its limit of {limit:.0f} s" if expired.is_set() else f"code {code}"
    return StageEnd(name, ended, round(seconds, 1), "\n".join(last))


def _kill(child: subprocess.Popen[str]) -> None:
    """Kills the stage and all processes in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
