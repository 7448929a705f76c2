"""Starts the process that speaks to trackers, hears what it tells, and ends it in time. Used by the supervisor.

Training never waits for it: its input is rank 0's events file, its output a file of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from finetune_api import events
from finetune_trainer.log import Log
from finetune_trainer.node import Node
from finetune_trainer.tail import Tail
from finetune_trainer.tracker import Ending

_SILENT_SECONDS = 5.0  # at the end, for a server that doesn't answer
_COMMAND = (sys.executable, "-m", "finetune_trainer.trackers")


class Tracking:
    """`listen` is called often; it logs what trackers tell, each thing once."""

    def __init__(self, node: Node, log: Log) -> None:
        config = node.run.tracking
        self._names = tuple(name for name in ("mlflow", "wandb") if getattr(config, name) is not None)
        self._log = log
        self._paths = node.paths
        self._tail = Tail(self._paths.events / "tracking.jsonl")
        self._where: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._gone = False
        self._failing: dict[str, float] = {}  # since when, by time.monotonic
        if not self._names or not node.leads:
            return
        self._paths.tracking_ending.unlink(missing_ok=True)
        shutil.rmtree(self._paths.tracking, ignore_errors=True)
        self._paths.tracking.mkdir(parents=True)
        self._process = subprocess.Popen(
            _COMMAND,
            env={**node.environment, "FINETUNE_SCRATCH": str(self._paths.scratch), "PYTHONUNBUFFERED": "1"},
            cwd=self._paths.tracking,
            stdin=subprocess.DEVNULL,
            stdout=(self._paths.tracking / "log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)  # training comes first

    @property
    def where(self) -> dict[str, str]:
        """By tracker: where people see the run."""
        return dict(self._where)

    def listen(self) -> None:
        if self._process is None:
            return
        for event in self._tail.read():
            if not isinstance(event, events.TrackingEvent):
                continue
            if event.state == "failing":
                self._failing[event.tracker] = time.monotonic()
                self._log.warning(
                    f"{event.tracker} doesn't record; training goes on, and what is missing is sent later",
                    detail=event.message,
                )
                continue
            self._failing.pop(event.tracker, None)
            self._log.info(f"{event.tracker}: {event.state}", detail=event.message or None)
            if event.state == "recording":
                self._where.setdefault(event.tracker, event.message)
            else:
                self._names = tuple(name for name in self._names if name != event.tracker)
        if not self._gone and self._process.poll() is not None:
            self._gone = True
            if self._names:
                self._log.warning(
                    "the process that speaks to trackers died; training goes on",
                    exit_code=self._process.returncode,
                    detail=_last_line(self._paths.tracking / "log"),
                )

    def end(self, ending: Ending, patience: float, *, until: tuple[str, ...] | None = None) -> None:
        """Tells how it ended and waits, at most `patience` seconds, until the trackers (or those of `until`) are done;
        for those that don't answer, some seconds.

        Without `until` it is over then: what hasn't been sent is told, once.
        """
        if self._process is None:
            return
        aside = self._paths.tracking_ending.with_suffix(".tmp")
        aside.write_text(ending.model_dump_json(by_alias=True, exclude_none=True))
        os.replace(aside, self._paths.tracking_ending)
        begun = time.monotonic()
        while self._waits_for(until, begun) and time.monotonic() < begun + patience:
            time.sleep(0.1)
            self.listen()
        self.listen()
        if until is not None:
            return
        if self._names and not self._gone:
            waited = f"{time.monotonic() - begun:.0f} s"
            self._log.warning(
                f"{' and '.join(self._names)} didn't take everything in {waited}; the result has all of it in "
                "finetune/history.jsonl",
            )
        self._kill()

    def _waits_for(self, until: tuple[str, ...] | None, begun: float) -> bool:
        left = self._names if until is None else [name for name in self._names if name in until]
        now = time.monotonic()
        silent = [name for name in left if now - max(begun, self._failing.get(name, now)) > _SILENT_SECONDS]
        return len(left) > len(silent) and not self._gone

    def _kill(self) -> None:
        self._gone = True
        if self._process is not None and self._process.poll() is None:
            # Its own children (wandb has one) are in its group.
            for number in (15, 9):
                try:
                    os.killpg(self._process.pid, number)
                except (ProcessLookupError, PermissionError):
                    break
                _wait(self._process, 1.0)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    done = threading.Thread(target=process.wait, daemon=True)
    done.start()
    done.join(seconds)


def _last_line(log: Path) -> str:
    try:
        return (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]
    except OSError:
        return ""
