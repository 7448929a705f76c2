"""Claims the destination for this job, and says what this job has stored there.

A destination that another job has claimed, or has stored something in, is refused before anything
is downloaded. `probe` writes one tiny object and removes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from finetune_api.messages.manifest import Manifest
from finetune_api.messages.run import JobRef, RunConfig
from finetune_api.names import FINETUNE_DIR, MANIFEST_PATH
from finetune_trainer.destination import claim, predecessor
from finetune_trainer.destination.claim import Owner
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import Storage

_FOLLOW_SECONDS = 300.0  # node 0 takes over a predecessor's checkpoints in this time
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Destination:
    """Describes what this job has stored in the destination.

    `finished` is the manifest of its result, parsed and as bytes, if there is one. `checkpoints`
    are the steps that have a manifest, the newest first.
    """

    finished: tuple[Manifest, bytes] | None
    checkpoints: tuple[int, ...]


@dataclass(frozen=True)
class Role:
    """Says what a pod may do in the destination.

    Node 0 `leads`: it claims and takes over. A `preflight` claims what nobody has claimed. The
    other nodes `follow`: they write nothing before node 0 has. `sign` signs a manifest.
    """

    kind: Literal["leads", "preflight", "follows"]
    sign: Callable[[Manifest], Manifest] = lambda manifest: manifest


def take(storage: Storage, run: RunConfig, role: Role) -> Destination:
    """Claims the destination and returns what this job has stored there.

    Raises RunError(OutputOccupied) if another job has claimed it, or has stored something there.
    """
    if role.kind == "follows":
        return _follow(storage, run)
    owner = claim.read(storage)
    created = owner is None
    owner = owner or claim.create(storage, run.job, run.recipe, claim.cluster(run))
    if owner.uid != run.job.uid and claim.is_abandoned(owner, run) and predecessor.is_empty(storage):
        predecessor.delete_parts(storage)
        owner = claim.take_over(storage, run.job, run.recipe, claim.cluster(run))
    if owner.uid != run.job.uid and not owner.precedes(run.job):
        raise claim.occupied(storage, owner, run.job)
    try:
        checkpoints, result = predecessor.manifests(storage), _result(storage)
        left = predecessor.leftovers(checkpoints, result[0] if result else None, run.job)
        predecessor.check(left, owner, run, storage.display)
        if role.kind == "leads" and (left or owner.precedes(run.job)):
            predecessor.take_over(storage, left, run, role.sign)
            return inspect(storage, run.job)
        if left:
            return Destination(None, ())
        return inspect(storage, run.job)
    except RunError as error:
        if created and error.reason == "OutputOccupied":
            claim.release(storage, run.job)
        raise


def inspect(storage: Storage, job: JobRef) -> Destination:
    """Returns what is there.

    Raises RunError(OutputOccupied) if it is the result of another job, or if the newest checkpoint
    whose manifest can be read is another job's.
    """
    result = _result(storage)
    if result is not None:
        return Destination((_own(result[0], job, storage), result[1]), ())
    checkpoints = predecessor.manifests(storage)
    newest = next((manifest for manifest in checkpoints.values() if manifest is not None), None)
    if newest is not None:
        _own(newest, job, storage)
    return Destination(None, tuple(checkpoints))


def own_manifest(data: bytes, job: JobRef, storage: Storage) -> Manifest | None:
    """Returns the manifest in `data`, or None if it isn't one.

    Raises RunError(OutputOccupied) if it belongs to another job.
    """
    manifest = predecessor.parse(data)
    return None if manifest is None else _own(manifest, job, storage)


def require_own_result(storage: Storage, job: JobRef) -> None:
    """Raises RunError(OutputOccupied) if the destination has another job's result."""
    result = _result(storage)
    if result is not None:
        _own(result[0], job, storage)


def probe(storage: Storage, job: JobRef) -> None:
    """Checks that the destination can be written, by a tiny object that is deleted again.

    It is created as a manifest is, so a storage that can't do that is noticed before training.
    Raises RunError, for example OutputNotFound or AccessDenied.
    """
    path = f"{FINETUNE_DIR}/.probe-{job.uid}-{job.attempt}"
    if not storage.create(path, b""):  # a probe that was killed has left it
        storage.write(path, b"")
    storage.delete((path,))


def _follow(storage: Storage, run: RunConfig) -> Destination:
    """Waits until node 0 has taken over what a predecessor left, if there is something."""
    deadline = time.monotonic() + _FOLLOW_SECONDS
    while True:
        owner, result = claim.read(storage), _result(storage)
        left = predecessor.leftovers(predecessor.manifests(storage), result[0] if result else None, run.job)
        if not left and not _precedes(owner, run.job):
            return inspect(storage, run.job)
        if time.monotonic() > deadline:
            raise RunError(
                "PeerLost", f"output.uri: node 0 hasn't claimed {storage.display} in {_FOLLOW_SECONDS:.0f} s"
            )
        time.sleep(_POLL_SECONDS)


def _precedes(owner: Owner | None, job: JobRef) -> bool:
    return owner is not None and owner.precedes(job)


def _result(storage: Storage) -> tuple[Manifest, bytes] | None:
    """Returns the manifest of the result, parsed and as bytes; None if there is none.

    Raises RunError(OutputOccupied) if it can't be parsed.
    """
    data = storage.read(MANIFEST_PATH)
    if data is None:
        return None
    manifest = predecessor.parse(data)
    if manifest is None:
        raise RunError(
            "OutputOccupied",
            f"output.uri: {storage.display}/{MANIFEST_PATH} isn't a manifest of this trainer; choose another "
            "output.uri, or delete it",
        )
    return manifest, data


def _own(manifest: Manifest, job: JobRef, storage: Storage) -> Manifest:
    """Returns the manifest. Raises RunError(OutputOccupied) if it belongs to another job."""
    owner = manifest.job
    if owner.uid != job.uid:
        content = "checkpoint" if manifest.kind == "checkpoint" else "result"
        raise RunError(
            "OutputOccupied",
            f"output.uri: {storage.display} has the {content} of {owner.namespace}/{owner.name}, "
            "not this job's; choose another output.uri, or delete its content",
        )
    return manifest
