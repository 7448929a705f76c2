"""Checks that this machine has what a long command needs, before the command starts.

Each check returns a Problem with its remedy, or None.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_GIB = 1 << 30


@dataclass(frozen=True)
class Problem:
    """What this machine lacks, and the remedy."""

    lack: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.lack}. {self.remedy}"


def check(problems: Iterable[Problem | None]) -> tuple[Problem, ...]:
    """Returns the problems among the checks' results."""
    return tuple(problem for problem in problems if problem is not None)


def python(minimum: tuple[int, int] = (3, 11)) -> Problem | None:
    """Whether this Python is new enough."""
    if sys.version_info[:2] >= minimum:
        return None
    needed = ".".join(map(str, minimum))
    return Problem(
        f"python3 is {platform.python_version()}, but {needed} or newer is needed",
        f"Install Python {needed} and put it first on PATH.",
    )


def linux() -> Problem | None:
    """Whether this is Linux."""
    if sys.platform == "linux":
        return None
    return Problem(
        f"this needs Linux, and this machine runs {platform.system()}",
        "Run it in a Linux virtual machine or container.",
    )


def root(why: str) -> Problem | None:
    """Whether this runs as root."""
    if os.geteuid() == 0:
        return None
    return Problem(f"{why} needs root, and the user ID is {os.geteuid()}", "Run it with sudo.")


def program(name: str, package: str) -> Problem | None:
    """Whether a program is on PATH."""
    if shutil.which(name):
        return None
    return Problem(f"{name} isn't on PATH", f"Install it (Debian package: {package}).")


def disk(folder: Path, needed: int) -> Problem | None:
    """Whether the file system of `folder`, which need not exist yet, has `needed` bytes free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return None
    return Problem(
        f"{folder} has {free / _GIB:.1f} GiB free, but {needed / _GIB:.0f} GiB are needed",
        "Free some space, move the checkout, or set FINETUNE_CACHE to a folder on a larger disk.",
    )


def memory(needed: int) -> Problem | None:
    """Whether `needed` bytes of memory are available."""
    available = available_memory(Path("/proc/meminfo").read_text())
    if available >= needed:
        return None
    return Problem(
        f"{available / _GIB:.1f} GiB of memory are available, but {needed / _GIB:.0f} GiB are needed",
        "Stop other programs, or use a larger machine.",
    )


def available_memory(meminfo: str) -> int:
    """Reads the available bytes from the text of /proc/meminfo."""
    line = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def port(number: int, address: str = "127.0.0.1") -> Problem | None:
    """Whether a TCP port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, number))
        except OSError as error:
            return Problem(
                f"port {number} of {address} can't be used ({error.strerror})",
                f"Stop the program that listens there (`ss -ltnp 'sport = :{number}'` names it).",
            )
    return None


def package_index() -> Problem | None:
    """Whether pip can reach its package index; it asks for the versions of a small package."""
    command = [sys.executable, "-m", "pip", "index", "versions", "uv", "--disable-pip-version-check"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        answer = None
    if answer is not None and answer.returncode == 0:
        return None
    lines = (answer.stderr.strip() if answer else "no answer within 30 seconds").splitlines()
    return Problem(
        f"pip can't reach its package index ({lines[-1] if lines else 'no output'})",
        "Check the network and proxy, or set PIP_INDEX_URL and UV_DEFAULT_INDEX to a mirror.",
    )
