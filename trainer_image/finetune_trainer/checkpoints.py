"""Uploads checkpoints in the background while training goes on. Fed by the supervisor's loop on node 0.

Keeps a checkpoint's files by hard links from the moment it is told of, so that the ranks may prune theirs. A failed
upload costs a warning and the next checkpoint's chance, never the training.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.status import CheckpointStatus
from finetune_trainer import digests, upload
from finetune_trainer.failure import Failed
from finetune_trainer.log import Log
from finetune_trainer.place import Place


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is complete in the destination."""

    status: CheckpointStatus
    seconds: float
    bytes: int


@dataclass(frozen=True)
class _Task:
    step: int
    folder: Path
    history: str
    bytes: int


class CheckpointUploader:
    """One upload at a time; of several that wait, the newest is taken."""

    def __init__(
        self, place: Place, *, links: Path, keep: int, log: Log, told: Callable[[Stored | None], None], patience: float
    ) -> None:
        self._place = place
        self._links = links
        self._keep = keep
        self._log = log
        self._told = told
        self._patience = patience
        self._changed = threading.Condition()
        self._next: _Task | None = None
        self._busy = False
        self.last: CheckpointStatus | None = None
        threading.Thread(target=self._run, name="checkpoints", daemon=True).start()

    def submit(self, step: int, folder: Path, history: str, size: int) -> None:
        """Takes hold of a complete local checkpoint; returns at once."""
        links = self._links / f"step-{step}"
        shutil.rmtree(links, ignore_errors=True)
        for path in digests.relative_files(folder):
            (links / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / path, links / path)
        with self._changed:
            if self._next is not None:
                shutil.rmtree(self._next.folder, ignore_errors=True)
            self._next = _Task(step, links, history, size)
            self._changed.notify_all()

    def wait(self, patience: float) -> bool:
        """Until nothing waits; False when time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._next is None and not self._busy, patience)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                task, self._next, self._busy = self._next, None, True
            try:
                if task is not None:
                    self._upload(task)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _upload(self, task: _Task) -> None:
        began = time.monotonic()
        try:
            status = upload.patiently(
                lambda: upload.checkpoint(self._place, task.folder, task.history, self._keep),
                what=f"the upload of checkpoint {task.step}",
                patience=self._patience,
                log=self._log,
            )
        except (Failed, OSError, ValueError) as error:
            self._log.warning("a checkpoint wasn't uploaded; training goes on", step=task.step, detail=str(error))
            self._told(None)
            return
        finally:
            shutil.rmtree(task.folder, ignore_errors=True)
        seconds = time.monotonic() - began
        self.last = status
        self._log.info("checkpoint uploaded", step=task.step, uri=status.uri, seconds=round(seconds, 2))
        self._told(Stored(status, seconds, task.bytes))
