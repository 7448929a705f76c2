"""Coordinates a checkpoint that several nodes upload: each writes a marker, and node 0 reads them.

A node's supervisor uploads its own shards and then its marker, which lists them with their digests.
The marker is stored next to the shards and names the attempt, so the markers of an
earlier attempt never count. The pods of an attempt have a secret in common, by which a node proves
that a marker is its own. This module reads and writes nothing but markers.
"""

from __future__ import annotations

import hmac
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import ValidationError

from finetune_api.base import LenientModel
from finetune_api.messages.manifest import FileEntry
from finetune_api.messages.run import JobRef
from finetune_api.names import CHECKPOINTS_DIR, checkpoint_dir
from finetune_trainer.errors import RunError
from finetune_trainer.paths import split_checkpoint_path
from finetune_trainer.storage.base import Storage

_MARKER = re.compile(r"node-(\d+)-attempt-(\d+)\.json")
_POLL_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)


class IncompleteCheckpoint(Exception):
    """Reports that a checkpoint stays incomplete; the message gives the reason."""


class ShardMarker(LenientModel):
    """Lists what one node has uploaded of a checkpoint."""

    uid: str
    node: int
    files: tuple[FileEntry, ...]
    proof: str = ""

    def proof_by(self, secret: bytes, at: str) -> str:
        """Returns the HMAC of everything else, and of the path; empty without a secret."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"proof"})
        text = json.dumps({**content, "path": at}, sort_keys=True)
        return hmac.digest(secret, b"shards " + text.encode(), "sha256").hex() if secret else ""


@dataclass(frozen=True)
class Group:
    """Identifies the pods of an attempt. `secret` is what only they know; empty if there is none,
    and then nothing is proven."""

    job: JobRef
    secret: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class WaitLimit:
    """Limits a wait for markers to some seconds; it also ends when `is_canceled` returns true."""

    seconds: float
    is_canceled: Callable[[], bool]


def path(step: int, node: int, attempt: int) -> str:
    """Returns the path of a node's marker in the destination."""
    return f"{checkpoint_dir(step)}/node-{node}-attempt-{attempt}.json"


def write_marker(storage: Storage, group: Group, step: int, node: int, files: tuple[FileEntry, ...]) -> None:
    """Writes a node's marker, after its files are uploaded: the marker makes them count."""
    marker, at = ShardMarker(uid=group.job.uid, node=node, files=files), path(step, node, group.job.attempt)
    marker = marker.model_copy(update={"proof": marker.proof_by(group.secret, at)})
    storage.write(at, marker.model_dump_json(by_alias=True).encode())


def wait_for_markers(
    storage: Storage, group: Group, step: int, nodes: range, limit: WaitLimit
) -> tuple[FileEntry, ...]:
    """Returns the files of all `nodes` once each has written its marker.

    Raises IncompleteCheckpoint if one doesn't within the limit, or if it has skipped this step: a
    node whose uploads are slower than checkpoints come has then written a marker for a later step.
    A storage that doesn't answer is asked again.
    """
    deadline = time.monotonic() + limit.seconds
    pauses = iter(_POLL_SECONDS)
    files: dict[int, tuple[FileEntry, ...]] = {}
    while True:
        try:
            markers = _list_markers(storage, group.job.attempt)
            for node in nodes:
                if (step, node) in markers and node not in files:
                    marker = _read_marker(storage, group, step, node)
                    files |= {node: marker.files} if marker is not None else {}
        except RunError as error:
            if error.reason != "StorageUnavailable":
                raise
            markers = frozenset()
        missing = [node for node in nodes if node not in files]
        if not missing:
            return tuple(file for node in nodes for file in files[node])
        later = [(node, later_step) for later_step, node in markers if node in missing and later_step > step]
        if later:
            raise IncompleteCheckpoint("node {} skipped it for step {}".format(*min(later)))
        if limit.is_canceled():
            raise IncompleteCheckpoint("it isn't needed any more")
        if time.monotonic() > deadline:
            names = ", ".join(str(node) for node in missing)
            raise IncompleteCheckpoint(f"node {names} uploaded no shards of it within {limit.seconds:.0f} s")
        time.sleep(next(pauses, _POLL_SECONDS[-1]))


def _list_markers(storage: Storage, attempt: int) -> frozenset[tuple[int, int]]:
    """Returns (step, node) for every marker of this attempt."""
    markers = set()
    for entry in storage.list(CHECKPOINTS_DIR):
        step, name = split_checkpoint_path(entry.path) or (0, "")
        match = _MARKER.fullmatch(name)
        if match and int(match.group(2)) == attempt:
            markers.add((step, int(match.group(1))))
    return frozenset(markers)


def _read_marker(storage: Storage, group: Group, step: int, node: int) -> ShardMarker | None:
    """Returns a node's marker; None if it is missing, unreadable, another job's or a stranger's."""
    at = path(step, node, group.job.attempt)
    try:
        marker = ShardMarker.model_validate_json(storage.read(at) or b"")
    except ValidationError:
        return None
    is_proven = hmac.compare_digest(marker.proof.encode(), marker.proof_by(group.secret, at).encode())
    return marker if is_proven and (marker.uid, marker.node) == (group.job.uid, node) else None
