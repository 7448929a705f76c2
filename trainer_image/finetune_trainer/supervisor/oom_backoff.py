"""Tells the next attempt to halve its micro-batches, by a small file next to the checkpoints.

If ranks can only compute together (ZeRO, FSDP), or if a process is killed for memory, the running
attempt can't recover. The supervisor writes this file instead, and the restarted ranks use
micro-batches half as large.

Since Kubernetes 1.28, all processes of a container are killed together for memory on cgroup v2, so
there may be nobody left to write it. `MemoryWatch` therefore writes a note of its own as soon as
memory is scarce, and deletes it when the attempt ends in any other way. A note that is still there
at the next start counts. If memory ran out too fast for a note, the operator's count of restarts
for lack of memory replaces it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from finetune_api.base import LenientModel
from finetune_api.messages.run import JobRef
from finetune_api.names import CHECKPOINT_STATE, CHECKPOINTS_DIR
from finetune_trainer import host_memory
from finetune_trainer.errors import RunError
from finetune_trainer.host_memory import CGROUPS
from finetune_trainer.log import Log
from finetune_trainer.storage.base import Storage

PATH = f"{CHECKPOINTS_DIR}/memory.json"
MAX_HALVINGS = 16
_LOOK_SECONDS = 0.5


class MemoryRecord(LenientModel):
    """Says how often the micro-batches of the job with this uid are to be halved."""

    uid: str
    halvings: int
    restarts: int = Field(default=0, description="Restarts for lack of memory that the halvings account for.")


class _SavedState(LenientModel):
    halvings: int = 0


def saved_halvings(checkpoint: Path | None) -> int:
    """Returns the halvings of a checkpoint on this node's disk; 0 without one."""
    state = checkpoint / CHECKPOINT_STATE if checkpoint else None
    if state is None or not state.is_file():
        return 0
    try:
        return _SavedState.model_validate_json(state.read_bytes()).halvings
    except ValidationError:
        return 0  # the ranks report it


def read(storage: Storage, job: JobRef, nodes: int = 1, restarts: int = 0, saved: int = 0) -> int:
    """Returns how often this job's micro-batches are to be halved; 0 without a record of it.

    An attempt that was killed while memory was scarce on one of its `nodes` counts as one that ran
    out of memory. So does each of the `restarts` that the operator counted for lack of memory and
    that nobody recorded. `saved` are the halvings of the checkpoint to resume from.
    """
    killed = [_record(storage, _note_path(node), job) for node in range(nodes)]
    record = _record(storage, PATH, job)
    recorded, accounted = (record.halvings, record.restarts) if record else (0, 0)
    halvings = max(recorded, saved) + max(0, restarts - accounted)
    return min(max(halvings, *(note.halvings + 1 for note in killed if note is not None), 0), MAX_HALVINGS)


def _settle(storage: Storage, job: JobRef, nodes: int, halvings: int, restarts: int, log: Log) -> None:
    """Records what the notes of a killed attempt and unrecorded restarts amount to."""
    notes = tuple(_note_path(node) for node in range(nodes) if _record(storage, _note_path(node), job) is not None)
    record = _record(storage, PATH, job)
    if notes:
        log.warning("the last attempt was killed while memory was scarce", halvings=halvings)
    if notes or restarts > (record.restarts if record else 0):
        write(storage, job, halvings, restarts, log)
        storage.delete(notes)


class MemoryWatch:
    """Knows how often this attempt's micro-batches were halved before it started, and notes in the
    destination that memory is scarce on this node, until the attempt ends."""

    def __init__(self, job: JobRef, node: int, log: Log, cgroups: Sequence[host_memory.Cgroup] = CGROUPS) -> None:
        self.halvings = 0
        self._storage: Storage | None = None
        self._job = job
        self._node = node
        self._log = log
        self._cgroups = cgroups
        self._writer: threading.Thread | None = None
        self._last_look = 0.0

    def start(self, storage: Storage, nodes: int, restarts: int = 0, saved: int = 0) -> None:
        """Reads the records of earlier attempts, as `read` does. On node 0, it also replaces their
        notes."""
        self.halvings, self._storage = read(storage, self._job, nodes, restarts, saved), storage
        if self._node == 0:
            _settle(storage, self._job, nodes, self.halvings, restarts, self._log)

    def look(self, halvings: int) -> None:
        """Writes the note, in a thread, if memory is scarce and none was written. `halvings` are
        those of the running attempt."""
        now = time.monotonic()
        if self._storage is None or self._writer is not None or now - self._last_look < _LOOK_SECONDS:
            return
        self._last_look = now
        if host_memory.is_scarce(self._cgroups):
            arguments = (self._storage, max(self.halvings, halvings))
            self._writer = threading.Thread(target=self._note, args=arguments, daemon=True)
            self._writer.start()

    def end(self) -> None:
        """Deletes the note, since the attempt has an end that is reported."""
        if self._storage is None or self._writer is None:
            return
        self._writer.join()
        try:
            self._storage.delete((_note_path(self._node),))
        except RunError as error:
            self._log.warning("can't delete the note that memory was scarce", detail=error.message)

    def _note(self, storage: Storage, halvings: int) -> None:
        self._log.warning("memory is scarce; if all processes are killed, the next attempt uses less")
        record = MemoryRecord(uid=self._job.uid, halvings=halvings)
        try:
            storage.write(_note_path(self._node), record.model_dump_json(by_alias=True).encode())
        except RunError as error:
            self._log.warning("can't note that memory is scarce", detail=error.message)


def _note_path(node: int) -> str:
    return f"{CHECKPOINTS_DIR}/scarce-memory-{node}.json"


def _record(storage: Storage, path: str, job: JobRef) -> MemoryRecord | None:
    """Returns what a file of this job records, or None if there is no such file."""
    data = storage.read(path)
    try:
        record = MemoryRecord.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None
    return record if record is not None and record.uid == job.uid else None


def write(storage: Storage | None, job: JobRef, halvings: int, restarts: int, log: Log) -> None:
    """Replaces the record of an earlier attempt; `restarts` is how many for lack of memory it
    accounts for. A failure is logged and costs only this record."""
    if storage is None:
        return
    record = MemoryRecord(uid=job.uid, halvings=min(halvings, MAX_HALVINGS), restarts=restarts)
    try:
        storage.write(PATH, record.model_dump_json(by_alias=True).encode())
    except RunError as error:
        log.warning("can't tell the next attempt to use less memory", detail=error.message)
    else:
        log.info("the next attempt halves its micro-batches", times=halvings)


def remove(storage: Storage) -> None:
    """Deletes the record. It is called after success."""
    storage.delete((PATH,))
