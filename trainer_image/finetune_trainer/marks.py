"""Checkpoints of several nodes: every node's supervisor uploads its own shards and leaves a mark; node 0 gathers them.

A mark lies beside the shards that it lists, with their digests, and names the attempt: what an earlier attempt left is
never counted. Called by `checkpoints`. Reads and writes marks only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from finetune_api.manifest import FileEntry
from finetune_api.model import LenientModel
from finetune_api.names import CHECKPOINTS_DIR, checkpoint_dir
from finetune_api.run import JobRef
from finetune_trainer.failure import Failed
from finetune_trainer.place import Place

_MARK = re.compile(rf"^{CHECKPOINTS_DIR}/step-(\d+)/node-(\d+)-attempt-(\d+)\.json$")
_POLL_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)


class Missing(Exception):
    """A checkpoint stays incomplete. The message says why."""


class Mark(LenientModel):
    """What one node has uploaded of a checkpoint."""

    uid: str
    node: int
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Wait:
    """`given_up` is asked between looks: nobody needs the checkpoint any more."""

    seconds: float
    given_up: Callable[[], bool]


def path(step: int, node: int, attempt: int) -> str:
    return f"{checkpoint_dir(step)}/node-{node}-attempt-{attempt}.json"


def leave(place: Place, job: JobRef, step: int, node: int, files: tuple[FileEntry, ...]) -> None:
    """After the files."""
    mark = Mark(uid=job.uid, node=node, files=files)
    place.write(path(step, node, job.attempt), mark.model_dump_json(by_alias=True).encode())


def gather(place: Place, job: JobRef, step: int, nodes: range, wait: Wait) -> tuple[FileEntry, ...]:
    """The files of all `nodes`, once each has left its mark. Raises Missing where one doesn't.

    A node that has passed a step over (its uploads are slower than checkpoints come) has left a mark for a later one.
    A store that doesn't answer is asked again.
    """
    deadline = time.monotonic() + wait.seconds
    pauses = iter(_POLL_SECONDS)
    found: dict[int, tuple[FileEntry, ...]] = {}
    while True:
        try:
            left = _left(place, job.attempt)
            for node in nodes:
                if (step, node) in left and node not in found and (mark := _read(place, job, step, node)) is not None:
                    found[node] = mark.files
        except Failed as failed:
            if failed.reason != "StorageUnavailable":
                raise
            left = frozenset()
        missing = [node for node in nodes if node not in found]
        if not missing:
            return tuple(file for node in nodes for file in found[node])
        later = [(node, at) for at, node in left if node in missing and at > step]
        if later:
            raise Missing("node {} passed it over for step {}".format(*min(later)))
        if wait.given_up():
            raise Missing("nobody waits for it any more")
        if time.monotonic() > deadline:
            told = ", ".join(str(node) for node in missing)
            raise Missing(f"node {told} left no shards of it within {wait.seconds:.0f} s")
        time.sleep(next(pauses, _POLL_SECONDS[-1]))


def _left(place: Place, attempt: int) -> frozenset[tuple[int, int]]:
    """(step, node) of all marks of this attempt."""
    found = (_MARK.match(entry.path) for entry in place.list(CHECKPOINTS_DIR))
    return frozenset((int(m.group(1)), int(m.group(2))) for m in found if m and int(m.group(3)) == attempt)


def _read(place: Place, job: JobRef, step: int, node: int) -> Mark | None:
    """None where it isn't this job's own."""
    try:
        mark = Mark.model_validate_json(place.read(path(step, node, job.attempt)) or b"")
    except ValidationError:
        return None
    return mark if (mark.uid, mark.node) == (job.uid, node) else None
