"""Uploads checkpoints in the background while training continues.

It runs on node 0 and, if checkpoints are sharded, on every node. A submitted checkpoint's files are
hard-linked, so the ranks can prune theirs. A failed upload is logged and costs that checkpoint, but
never the training. If checkpoints are sharded, node 0 waits for the other nodes' markers before it
completes one. It waits as long as its own upload took, and at least `Timing.marker_timeout`.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.messages.manifest import FileEntry
from finetune_api.status import CheckpointStatus
from finetune_trainer import manifest
from finetune_trainer.destination import shard_markers
from finetune_trainer.destination.deposit import Writer
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.storage.base import Storage
from finetune_trainer.supervisor import upload
from finetune_trainer.supervisor.node import Node


@dataclass(frozen=True)
class StoredCheckpoint:
    """Describes a checkpoint that is complete in the destination, and how long its upload took."""

    status: CheckpointStatus
    seconds: float
    bytes: int


@dataclass(frozen=True)
class FailedUpload:
    """Describes a failed try to store a checkpoint. `is_lost` says that there is no other one."""

    step: int
    error: RunError
    is_lost: bool


@dataclass(frozen=True)
class ThisNode:
    """Identifies this node among the `count` nodes of a job. `marker_timeout` is in seconds, and
    `secret` what the nodes of an attempt have in common."""

    writer: Writer
    rank: int
    count: int
    marker_timeout: float
    secret: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, node: Node, writer: Writer) -> ThisNode:
        """Returns the identity of a pod that stores as `writer`."""
        return cls(writer, node.rank, node.run.world.nodes, node.timing.marker_timeout, node.rendezvous_secret)

    @property
    def group(self) -> shard_markers.Group:
        """The nodes of this attempt."""
        return shard_markers.Group(self.writer.job, self.secret)


@dataclass(frozen=True)
class _Task:
    """Describes an upload: hard links to the files of a checkpoint, and their size in bytes."""

    step: int
    folder: Path
    history: str
    bytes: int


class CheckpointUploader:
    """Uploads one checkpoint at a time. A newly submitted one replaces the one that waits.

    `on_result` is called in the uploader's thread with a stored checkpoint, and with each failure.
    An upload is retried for `timeout` seconds, and not once the next checkpoint waits.
    """

    def __init__(
        self,
        storage: Storage,
        node: ThisNode,
        *,
        links: Path,
        keep: int,
        log: Log,
        on_result: Callable[[StoredCheckpoint | FailedUpload], None],
        timeout: float,
    ) -> None:
        self._storage = storage
        self._node = node
        self._links = links
        self._keep = keep
        self._log = log
        self._on_result = on_result
        self._timeout = timeout
        self._changed = threading.Condition()
        self._next: _Task | None = None
        self._busy = False
        self._closed = False
        threading.Thread(target=self._run, name="checkpoints", daemon=True).start()

    def submit(self, step: int, folder: Path, history: str, size: int) -> None:
        """Links the files of a complete local checkpoint and returns; the upload happens later."""
        links = self._links / f"step-{step}"
        shutil.rmtree(links, ignore_errors=True)
        for path in manifest.relative_files(folder):
            (links / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / path, links / path)
        with self._changed:
            self._drop_next()
            self._next = _Task(step, links, history, size)
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Waits until every upload has ended. Returns False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._next is None and not self._busy, timeout)

    def close(self, timeout: float) -> bool:
        """Drops the checkpoint that waits, as no more are needed, and waits for the current one.

        Returns False after `timeout` seconds.
        """
        with self._changed:
            self._closed = True
            self._drop_next()
        return self.wait(timeout)

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
        started = time.monotonic()
        patience = upload.Patience(
            self._timeout,
            on_error=lambda error: self._on_result(FailedUpload(task.step, error, is_lost=False)),
            is_over=lambda: self._next is not None or self._closed,
        )
        try:
            status = upload.retry(
                lambda: self._upload_files(task, started),
                patience,
                name=f"the upload of checkpoint {task.step}",
                log=self._log,
            )
        except shard_markers.IncompleteCheckpoint as error:
            if not self._closed:
                message = "a checkpoint is incomplete; the previous one remains"
                self._log.warning(message, step=task.step, detail=str(error))
                self._lose(task.step, RunError("PeerLost", str(error)))
            return
        except (RunError, OSError, ValueError) as error:
            self._log.warning("a checkpoint wasn't stored; training continues", step=task.step, detail=str(error))
            self._lose(task.step, error if isinstance(error, RunError) else RunError("StorageUnavailable", str(error)))
            return
        finally:
            shutil.rmtree(task.folder, ignore_errors=True)
        seconds = time.monotonic() - started
        if status is None:
            self._log.info("shards of a checkpoint uploaded", step=task.step, seconds=round(seconds, 2))
            return
        self._log.info("checkpoint uploaded", step=task.step, uri=status.uri, seconds=round(seconds, 2))
        self._on_result(StoredCheckpoint(status, seconds, task.bytes))

    def _lose(self, step: int, error: RunError) -> None:
        self._on_result(FailedUpload(step, error, is_lost=True))

    def _upload_files(self, task: _Task, started: float) -> CheckpointStatus | None:
        """Uploads this node's part of a checkpoint. Only node 0 returns a status."""
        node = self._node
        if node.rank:
            upload.shards(self._storage, task.folder, node.group, node.rank)
            return None

        def files_of_other_nodes(step: int) -> tuple[FileEntry, ...]:
            """Waits for the other nodes' markers; returns no files unless it is sharded."""
            if node.count == 1 or not (task.folder / manifest.INDEX).exists():
                return ()
            seconds = max(node.marker_timeout, time.monotonic() - started)
            limit = shard_markers.WaitLimit(seconds, lambda: self._closed)
            return shard_markers.wait_for_markers(self._storage, node.group, step, range(1, node.count), limit)

        return upload.checkpoint(
            self._storage, node.writer, task.folder, task.history, self._keep, files_of_other_nodes
        )
