"""Starts the tracker process, logs what it reports, and ends it in time.

Training never waits for it: it reads rank 0's events file and writes an events file of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.messages import events
from finetune_api.messages.run import RunConfig
from finetune_trainer.log import Log
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.event_reader import EventReader
from finetune_trainer.reporting.trackers.worker import Ending

_UNRESPONSIVE_SECONDS = 5.0  # how long the end waits for a server that doesn't respond
_COMMAND = (sys.executable, "-m", "finetune_trainer.reporting.trackers")


@dataclass(frozen=True)
class Attempt:
    """Describes the attempt that trackers record.

    `leads` is set on the node that records. `timeout` is how many seconds trackers have at the end
    to receive what they lack.
    """

    run: RunConfig
    paths: Paths
    environment: Mapping[str, str] = field(repr=False)
    leads: bool
    timeout: float


class TrackerProcess:
    """Controls the tracker process of one attempt. It does nothing except on the leading node."""

    def __init__(self, attempt: Attempt, log: Log) -> None:
        config = attempt.run.tracking
        self._pending = tuple(name for name in ("mlflow", "wandb") if getattr(config, name) is not None)
        self._log = log
        self._paths = attempt.paths
        self._reader = EventReader(self._paths.events / "tracking.jsonl")
        self._urls: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = False
        self._failed_at: dict[str, float] = {}  # by tracker, while it fails; as time.monotonic counts
        if not self._pending or not attempt.leads:
            return
        self._paths.tracking_ending.unlink(missing_ok=True)
        shutil.rmtree(self._paths.tracking, ignore_errors=True)
        self._paths.tracking.mkdir(parents=True)
        self._process = subprocess.Popen(
            _COMMAND,
            env={
                **attempt.environment,
                "FINETUNE_SCRATCH": str(self._paths.scratch),
                "PYTHONUNBUFFERED": "1",
                "PYTHONSAFEPATH": "1",
            },
            cwd=self._paths.tracking,
            stdin=subprocess.DEVNULL,
            stdout=(self._paths.tracking / "log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)  # training has priority

    @property
    def urls(self) -> dict[str, str]:
        """The URL of the run, by tracker."""
        return dict(self._urls)

    def poll(self) -> None:
        """Logs what the trackers have reported since the last call. Never blocks; call it often."""
        if self._process is None:
            return
        for event in self._reader.read():
            if not isinstance(event, events.TrackingEvent):
                continue
            if event.state == "failing":
                self._failed_at[event.tracker] = time.monotonic()
                self._log.warning(
                    f"{event.tracker} can't record; training continues, and missing data is sent later",
                    detail=event.message,
                )
                continue
            self._failed_at.pop(event.tracker, None)
            self._log.info(f"{event.tracker}: {event.state}", detail=event.message or None)
            if event.state == "recording":
                self._urls.setdefault(event.tracker, event.message)
            else:
                self._pending = tuple(name for name in self._pending if name != event.tracker)
        if not self._exited and self._process.poll() is not None:
            self._exited = True
            if self._pending:
                self._log.warning(
                    "the tracker process died; training continues",
                    exit_code=self._process.returncode,
                    detail=_last_line(self._paths.tracking / "log"),
                )

    def end(self, ending: Ending, timeout: float, *, until: tuple[str, ...] | None = None) -> None:
        """Announces how the attempt ended and waits until the trackers are done.

        It waits for at most `timeout` seconds, and for 5 seconds for servers that don't respond.
        With `until` it waits for these trackers only. Without it, the process is then killed, and
        trackers that lack data are logged.
        """
        if self._process is None:
            return
        partial = self._paths.tracking_ending.with_suffix(".tmp")
        partial.write_text(ending.model_dump_json(by_alias=True, exclude_none=True))
        os.replace(partial, self._paths.tracking_ending)
        started = time.monotonic()
        while self._waits_for(until, started) and time.monotonic() < started + timeout:
            time.sleep(0.1)
            self.poll()
        self.poll()
        if until is not None:
            return
        if self._pending and not self._exited:
            waited = f"{time.monotonic() - started:.0f} s"
            self._log.warning(
                f"{' and '.join(self._pending)} didn't receive everything in {waited}; the result has all of it in "
                "finetune/history.jsonl",
            )
        self._kill()

    def _waits_for(self, until: tuple[str, ...] | None, started: float) -> bool:
        """Whether a tracker that responds isn't done yet."""
        pending = self._pending if until is None else [name for name in self._pending if name in until]
        now = time.monotonic()
        unresponsive = [
            name for name in pending if now - max(started, self._failed_at.get(name, now)) > _UNRESPONSIVE_SECONDS
        ]
        return len(pending) > len(unresponsive) and not self._exited

    def _kill(self) -> None:
        self._exited = True
        if self._process is not None and self._process.poll() is None:
            # Its own children (wandb has one) are in its process group.
            for signal_number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(self._process.pid, signal_number)
                except (ProcessLookupError, PermissionError):
                    break
                _wait(self._process, 1.0)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    waiter = threading.Thread(target=process.wait, daemon=True)
    waiter.start()
    waiter.join(seconds)


def _last_line(log: Path) -> str:
    try:
        return (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]
    except OSError:
        return ""
