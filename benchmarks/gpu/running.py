"""Starts a rank on a prepared scratch folder, as the supervisor does, and reads its events.

It also reads what `benchmarks.gpu.observed` recorded about the rank.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.messages import events
from finetune_trainer.paths import Paths

_MEMORY = re.compile(r"([\d.]+) GiB")


@dataclass(frozen=True)
class FinishedRank:
    """A rank that ended or was killed. `observed` are the figures of `observed.Observer`."""

    paths: Paths
    code: int
    seconds: float
    observed: Mapping[str, Any]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Returns the rank's events of that type, in order."""
        return read_events(self.paths, kind)

    @property
    def losses(self) -> tuple[float, ...]:
        """The training loss of each step."""
        return tuple(event["loss"] for event in self.events("step"))

    def decision(self, topic: str) -> str:
        """Returns the last choice of a decision, with its reason; empty if there was none."""
        choices = [f"{e['choice']} ({e['reason']})" for e in self.events("decision") if e["topic"] == topic]
        return choices[-1] if choices else ""

    def choice(self, topic: str) -> str:
        """Returns the first choice of a decision; empty if there was none."""
        return next((e["choice"] for e in self.events("decision") if e["topic"] == topic), "")

    @property
    def estimate_bytes(self) -> float | None:
        """The trainer's memory estimate; None if it made none."""
        match = _MEMORY.match(self.choice("memory"))
        return float(match.group(1)) * 2**30 if match else None

    @property
    def error(self) -> str:
        """Why the rank failed: its error event, else the end of its log."""
        reported = [f"{event['reason']}: {event['message']}" for event in self.events("error")]
        log = self.paths.rank_log(0)
        tail = " ".join(log.read_text(errors="replace").split())[-300:] if log.is_file() else ""
        return (reported or [tail])[-1]


def read_events(paths: Paths, kind: str) -> list[dict[str, Any]]:
    """Returns rank 0's events of that type so far, in order."""
    path = paths.rank_events(0)
    lines = path.read_bytes().splitlines() if path.is_file() else []
    decoded = (events.decode(line) for line in lines)
    return [event.model_dump() for event in decoded if event is not None and event.type == kind]


class Rank:
    """A running rank, the only one of its world."""

    def __init__(
        self,
        paths: Paths,
        *,
        options: Sequence[str] = (),
        threads: int = 2,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.paths = paths
        self._report = paths.scratch / "observed.json"
        self._began = time.monotonic()
        with paths.rank_log(0).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.observed", str(self._report), *options],
                env={
                    **os.environ, **_WORLD, "MASTER_PORT": str(_free_port()), "FINETUNE_SCRATCH": str(paths.scratch),
                    "OMP_NUM_THREADS": str(threads), "PYTHONFAULTHANDLER": "1", **(environment or {}),
                },
                stdout=log, stderr=log,
            )  # fmt: skip

    def until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Waits until `condition` holds; returns False if the rank ended or it took too long."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if condition():
                return True
            if self.process.poll() is not None:
                return condition()
            time.sleep(0.02)
        return False

    def steps(self) -> int:
        """Returns the number of steps so far."""
        return len(read_events(self.paths, "step"))

    def wait(self, timeout: float = 300) -> FinishedRank:
        """Waits for the rank's end, and kills it after `timeout` seconds."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            code = self.process.wait()
        seconds = time.monotonic() - self._began
        observed = json.loads(self._report.read_text()) if self._report.is_file() else {}
        return FinishedRank(self.paths, code, seconds, observed)


def run(paths: Paths, *, timeout: float = 300, **options: Any) -> FinishedRank:
    """Runs a rank from start to end. `options` are those of `Rank`."""
    return Rank(paths, **options).wait(timeout)


def run_for(paths: Paths, seconds: float, *, timeout: float, **options: Any) -> FinishedRank:
    """Runs a rank until `seconds` after its third step, then stops it by the trainer's own flag."""
    rank = Rank(paths, **options)
    if rank.until(lambda: rank.steps() >= 3, timeout):
        end = time.monotonic() + seconds
        rank.until(lambda: time.monotonic() > end and rank.steps() >= 5, timeout)
        paths.stop.touch()
    return rank.wait(timeout)


def tokens_per_second(finished: FinishedRank, *, skip: int) -> float:
    """Returns the throughput of the steps after the first `skip`; 0 if there are too few.

    Time is measured from the end of one step to the end of the next.
    """
    steps = finished.events("step")
    if len(steps) <= skip + 1:
        skip = max(0, len(steps) - 2)
    measured = steps[skip:]
    if len(measured) < 2:
        return 0.0
    return float(sum(step["tokens"] for step in measured[1:]) / (measured[-1]["time"] - measured[0]["time"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_WORLD = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def scratch_root(device: str) -> Path:
    """Returns the folder for models: in memory if possible, since every run reads the weights."""
    shared = Path("/dev/shm")
    if device == "cuda" and shared.is_dir() and os.access(shared, os.W_OK):
        return shared
    return Path(os.environ.get("TMPDIR", "/tmp"))
