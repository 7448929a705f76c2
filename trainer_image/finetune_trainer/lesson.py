"""What an attempt learnt about memory, for the next one: a small file beside the checkpoints in the destination.

Where ranks only compute together (ZeRO, FSDP), or a process is killed for memory, nothing can be done at once: the
supervisor leaves this, and the restarted group takes micro-batches half as large. Called by the supervisor only.
"""

from __future__ import annotations

from pydantic import ValidationError

from finetune_api.model import LenientModel
from finetune_api.names import CHECKPOINTS_DIR
from finetune_api.run import JobRef
from finetune_trainer.failure import Failed
from finetune_trainer.log import Log
from finetune_trainer.place import Place

PATH = f"{CHECKPOINTS_DIR}/memory.json"
MOST = 16


class Lesson(LenientModel):
    uid: str
    halvings: int


def read(place: Place, job: JobRef) -> int:
    """How often this job's micro-batches are to be halved; 0 where nobody said so."""
    data = place.read(PATH)
    try:
        lesson = Lesson.model_validate_json(data) if data is not None else None
    except ValidationError:
        return 0
    return lesson.halvings if lesson is not None and lesson.uid == job.uid else 0


def leave(place: Place | None, job: JobRef, halvings: int, log: Log) -> None:
    """Replaces what an earlier attempt left. A store that doesn't answer is told, and loses only this."""
    if place is None:
        return
    told = Lesson(uid=job.uid, halvings=min(halvings, MOST))
    try:
        place.write(PATH, told.model_dump_json(by_alias=True).encode())
    except Failed as lost:
        log.warning("the next attempt isn't told to take less memory", detail=lost.message)
    else:
        log.info("the next attempt halves its micro-batches", times=halvings)


def forget(place: Place) -> None:
    """After success."""
    place.delete((PATH,))
