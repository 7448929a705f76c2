"""Claims the destination: a file that only one job can create says whose folder it is.

The file is created before anything is downloaded and deleted with the last checkpoint, once the
result is complete; from then on the manifest of the result says whose it is. Whoever writes
checks before that the claim is still its own. A job of the same namespace and name may take over
the claim of its predecessor: Kubernetes has only one of them at a time. So may any job whose
operator knows that the owner doesn't exist any more, if nothing is stored there.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from finetune_api import untrusted
from finetune_api.base import LenientModel
from finetune_api.messages.run import JobRef, RunConfig
from finetune_api.names import OWNER_PATH
from finetune_trainer.errors import RunError
from finetune_trainer.manifest import now_rfc3339, of_bytes
from finetune_trainer.storage.base import Storage


class Owner(LenientModel):
    """Names the job that has claimed a destination."""

    namespace: str
    name: str
    uid: str
    recipe: dict[str, str] = Field(default_factory=dict, description="As in RunConfig.")
    since: str = ""
    cluster: str = Field(default="", description="Digest of the authority of the operator; empty if unknown.")

    def precedes(self, job: JobRef) -> bool:
        """Whether it is a deleted job of the same namespace and name."""
        return (self.namespace, self.name) == (job.namespace, job.name) and self.uid != job.uid


def read(storage: Storage) -> Owner | None:
    """Returns who has claimed the destination; None if nobody has.

    Raises RunError(OutputOccupied) if the file can't be read.
    """
    data = storage.read(OWNER_PATH)
    if data is None:
        return None
    try:
        return Owner.model_validate_json(data)
    except ValidationError:
        raise RunError(
            "OutputOccupied",
            f"output.uri: {storage.display}/{OWNER_PATH} isn't a claim of this trainer; choose another output.uri, or "
            "delete it",
        ) from None


def cluster(run: RunConfig) -> str:
    """Returns what tells the cluster of a run from others; empty if nothing does.

    Each operator has an authority of its own, unless an administrator gives several the same one.
    """
    authority = run.progress.authority if run.progress else None
    return of_bytes(authority.encode()) if authority else ""


def is_abandoned(owner: Owner, run: RunConfig) -> bool:
    """Whether the FineTuneJob that has claimed a destination doesn't exist any more, as the
    operator of the same cluster knows, and none of its pods runs."""
    rivals = run.rivals
    if rivals is None or not owner.cluster or owner.cluster != cluster(run) or rivals.include(owner.uid):
        return False
    since, known = untrusted.seconds(owner.since), untrusted.seconds(rivals.as_of)
    is_older = since is not None and known is not None and since < known
    return is_older and (not rivals.namespaces or owner.namespace in rivals.namespaces)


def create(storage: Storage, job: JobRef, recipe: Mapping[str, str], cluster: str = "") -> Owner:
    """Claims a destination that nobody has claimed. Returns who has it then.

    Of several jobs that try at the same time, one succeeds. The claim is read again, because some
    stores ignore the condition and let the last one have it.
    """
    claim = _owner(job, recipe, cluster)
    storage.create(OWNER_PATH, _as_bytes(claim))
    return read(storage) or claim  # it was deleted in between: a job has just ended here


def take_over(storage: Storage, job: JobRef, recipe: Mapping[str, str], cluster: str = "") -> Owner:
    """Replaces the claim of a predecessor. Returns who has it then."""
    claim = _owner(job, recipe, cluster)
    storage.write(OWNER_PATH, _as_bytes(claim))
    return read(storage) or claim


def require(storage: Storage, job: JobRef) -> None:
    """Raises RunError(OutputOccupied) if another job has taken over the destination meanwhile."""
    owner = read(storage)
    if owner is not None and owner.uid != job.uid:
        raise occupied(storage, owner, job)


def release(storage: Storage, job: JobRef) -> None:
    """Deletes the job's own claim; that of another job stays."""
    owner = read(storage)
    if owner is not None and owner.uid == job.uid:
        storage.delete((OWNER_PATH,))


def occupied(storage: Storage, owner: Owner, job: JobRef) -> RunError:
    """Returns the error for a destination that another job has claimed."""
    if owner.precedes(job):
        return RunError(
            "OutputOccupied",
            f"output.uri: {storage.display} was taken over by another FineTuneJob {job.namespace}/{job.name}; delete "
            "one of the two",
        )
    return RunError(
        "OutputOccupied",
        f"output.uri: {storage.display} is claimed by {owner.namespace}/{owner.name} since {owner.since}; choose "
        f"another output.uri or, if that job doesn't exist any more, delete {OWNER_PATH} and checkpoints/ there",
    )


def _owner(job: JobRef, recipe: Mapping[str, str], cluster: str) -> Owner:
    identity = {"namespace": job.namespace, "name": job.name, "uid": job.uid}
    return Owner(**identity, recipe=dict(recipe), since=now_rfc3339(), cluster=cluster)


def _as_bytes(owner: Owner) -> bytes:
    return owner.model_dump_json(by_alias=True, indent=1).encode()
