"""Uploads checkpoints in the background while training goes on. Fed by the supervisor's loop on node 0, and on every
node where they are written in shards.

Keeps a checkpoint's files by hard links from the moment it is told of, so that the ranks may prune theirs. A failed
upload costs a warning and the next checkpoint's chance, never the training. In shards, node 0 waits for the other
nodes' marks before it completes one: as long again as its own upload took, and at least `Timing.marks_seconds`.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.manifest import FileEntry
from finetune_api.run import JobRef
from finetune_api.status import CheckpointStatus
from finetune_trainer import digests, manifest_io, marks, upload
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
class Group:
    """Which node this is, of how many."""

    job: JobRef
    node: int
    nodes: int
    marks_seconds: float


@dataclass(frozen=True)
class _Task:
    step: int
    folder: Path
    history: str
    bytes: int


class CheckpointUploader:
    """One upload at a time; of several that wait, the newest is taken."""

    def __init__(
        self,
        place: Place,
        group: Group,
        *,
        links: Path,
        keep: int,
        log: Log,
        told: Callable[[Stored | None], None],
        patience: float,
    ) -> None:
        self._place = place
        self._group = group
        self._links = links
        self._keep = keep
        self._log = log
        self._told = told
        self._patience = patience
        self._changed = threading.Condition()
        self._next: _Task | None = None
        self._busy = False
        self._closed = False
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
            self._drop_next()
            self._next = _Task(step, links, history, size)
            self._changed.notify_all()

    def wait(self, patience: float) -> bool:
        """Until nothing waits; False when time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._next is None and not self._busy, patience)

    def close(self, patience: float) -> bool:
        """Once nobody needs checkpoints any more. What is being sent arrives first; False when time ran out."""
        with self._changed:
            self._closed = True
            self._drop_next()
        return self.wait(patience)

    def _drop_next(self) -> None:
        if self._next is not None:
            shutil.rmtree(self._next.folder, ignore_errors=True)
            self._next = None

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
                lambda: self._send(task, began),
                what=f"the upload of checkpoint {task.step}",
                patience=self._patience,
                log=self._log,
            )
        except marks.Missing as missing:
            if not self._closed:
                why = str(missing)
                self._log.warning("a checkpoint isn't complete; the one before stays", step=task.step, detail=why)
                self._told(None)
            return
        except (Failed, OSError, ValueError) as error:
            self._log.warning("a checkpoint wasn't uploaded; training goes on", step=task.step, detail=str(error))
            self._told(None)
            return
        finally:
            shutil.rmtree(task.folder, ignore_errors=True)
        seconds = time.monotonic() - began
        if status is None:
            self._log.info("a checkpoint's shards are uploaded", step=task.step, seconds=round(seconds, 2))
            return
        self.last = status
        self._log.info("checkpoint uploaded", step=task.step, uri=status.uri, seconds=round(seconds, 2))
        self._told(Stored(status, seconds, task.bytes))

    def _send(self, task: _Task, began: float) -> CheckpointStatus | None:
        """None on other nodes than the first, which don't complete a checkpoint."""
        group = self._group
        if group.node:
            upload.shards(self._place, task.folder, group.job, group.node)
            return None

        def others(step: int) -> tuple[FileEntry, ...]:
            if group.nodes == 1 or not (task.folder / manifest_io.INDEX).exists():
                return ()
            seconds = max(group.marks_seconds, time.monotonic() - began)
            wait = marks.Wait(seconds, lambda: self._closed)
            return marks.gather(self._place, group.job, step, range(1, group.nodes), wait)

        return upload.checkpoint(self._place, task.folder, task.history, self._keep, others)
