"""The frame of a long command: its checks, its steps, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from steps.checks import Problem
from steps.runner import StepFailed, Steps

STOPPED = 130  # exit code after Ctrl-C, as in shells


def run_command(
    name: str, problems: Sequence[Problem], start: Callable[[], Steps], body: Callable[[Steps], int]
) -> int:
    """Runs `body` with the steps that `start` returns, unless there are problems.

    `name` is the command as users type it. Returns the exit code of `body`, 2 if the machine lacks
    something, 1 if a step failed and STOPPED after Ctrl-C.
    """
    for problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    if problems:
        return 2
    try:
        code = body(start())
    except StepFailed as failed:
        print(f"{name}: {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        code = STOPPED
    if code == STOPPED:
        print(f"{name}: stopped; `{name}` resumes here", file=sys.stderr)
    return code


def attached(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Runs a program on this terminal; returns its exit code.

    Ctrl-C reaches the program, too, which then saves what it has done, so this waits for its end.
    """
    process = subprocess.Popen(command, cwd=folder, env=environment)
    interrupted = False
    while True:
        try:
            code = process.wait()
            return STOPPED if interrupted and code else code
        except KeyboardInterrupt:
            interrupted = True
