"""Server programs of the local cluster, started on a loopback port for tests without a cluster."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0


@cache
def program(name: str) -> Path:
    """Return the path of a program in the cache; it is fetched or built if it isn't there yet."""
    done = subprocess.run(
        [sys.executable, "-m", "localcluster", "tool", name],
        env={**os.environ, "PYTHONPATH": str(ROOT / "hack")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip().splitlines()[-1])


@contextmanager
def running(
    command: Sequence[str], endpoint: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the block ends, even if it raises an error.

    Raises RuntimeError with the end of its log if it doesn't answer.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=file, stderr=file)
    try:
        _wait(endpoint, process, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    context = ssl._create_unverified_context()  # a start is awaited here, and no secret is sent
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=5, context=context).close()
            return
        except urllib.error.HTTPError:
            return  # it answers: a request without a key is refused
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"{log.name}: no answer at {endpoint}: {log.read_text(errors='replace')[-2000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
