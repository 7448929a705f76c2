"""Tells the next attempt to halve its micro-batches, by a small file next to the checkpoints.

If ranks can only compute together (ZeRO, FSDP), or if a process is killed for memory, the running
attempt can't recover. The supervisor writes this file instead, and the restarted ranks use
micro-batches half as large.
"""

from __future__ import annotations

from pydantic import ValidationError

from finetune_api.base import LenientModel
from finetune_api.messages.run import JobRef
from finetune_api.names import CHECKPOINTS_DIR
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.storage.base import Storage

PATH = f"{CHECKPOINTS_DIR}/memory.json"
MAX_HALVINGS = 16


class MemoryRecord(LenientModel):
    """Says how often the micro-batches of the job with this uid are to be halved."""

    uid: str
    halvings: int


def read(storage: Storage, job: JobRef) -> int:
    """Returns how often this job's micro-batches are to be halved; 0 without a record of it."""
    data = storage.read(PATH)
    try:
        record = MemoryRecord.model_validate_json(data) if data is not None else None
    except ValidationError:
        return 0
    return record.halvings if record is not None and record.uid == job.uid else 0


def write(storage: Storage | None, job: JobRef, halvings: int, log: Log) -> None:
    """Replaces the record of an earlier attempt. A failure is logged and costs only this record."""
    if storage is None:
        return
    record = MemoryRecord(uid=job.uid, halvings=min(halvings, MAX_HALVINGS))
    try:
        storage.write(PATH, record.model_dump_json(by_alias=True).encode())
    except RunError as error:
        log.warning("can't tell the next attempt to use less memory", detail=error.message)
    else:
        log.info("the next attempt halves its micro-batches", times=halvings)


def remove(storage: Storage) -> None:
    """Deletes the record. It is called after success."""
    storage.delete((PATH,))
