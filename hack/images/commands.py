"""Runs other programs. No other module of images starts a process."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from images.errors import ImagesError


def answer(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str | None:
    """Returns what the program prints, None if it fails or is missing."""
    try:
        done = subprocess.run(
            command, env=_environment(environment), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def do(command: Sequence[str], environment: Mapping[str, str] | None = None, remedy: str = "") -> str:
    """Runs the program and returns its stdout; its stderr is shown.

    Raises ImagesError with the command, its exit status and `remedy`.
    """
    try:
        done = subprocess.run(command, env=_environment(environment), stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise ImagesError(f"{command[0]} is not installed. {remedy}".strip()) from None
    if done.returncode:
        raise ImagesError(
            f"`{shlex.join(command)}` ended with exit code {done.returncode}; see its output above. {remedy}".strip()
        )
    return done.stdout.strip()


def watch(command: Sequence[str], environment: Mapping[str, str] | None = None, remedy: str = "") -> None:
    """Runs the program like `do`, but shows its stdout live on stderr, for long builds."""
    try:
        done = subprocess.run(command, env=_environment(environment), stdout=sys.stderr)
    except FileNotFoundError:
        raise ImagesError(f"{command[0]} is not installed. {remedy}".strip()) from None
    if done.returncode:
        raise ImagesError(
            f"`{shlex.join(command)}` ended with exit code {done.returncode}; see its output above. {remedy}".strip()
        )


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(extra or {})}
