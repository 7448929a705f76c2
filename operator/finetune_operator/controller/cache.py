"""Caches the last known state of all FineTuneJobs, their Jobs and their pods.

It is fed by watches, by lists and by the responses to our own writes, and never talks to the API
server itself. An older version never replaces a newer one, and never brings a deleted object back,
so the order in which they arrive doesn't matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune_api import names
from finetune_operator.core import objects
from finetune_operator.core.objects import Attempt, ChildJob, Pod

Key = tuple[str, str]
"""The namespace and name of a FineTuneJob."""

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class JobSnapshot:
    """Holds what the cache knows about one FineTuneJob at one moment: its raw body and its
    children.

    Children are matched by owner uid. `core.objects.Observed` is made from it: its body is parsed
    and validated, and it adds warning events and the newest progress report.
    """

    body: Raw
    attempts: tuple[Attempt, ...]
    preflight: Attempt | None
    orphaned_pods: tuple[Pod, ...]

    @property
    def key(self) -> Key:
        """The key of the FineTuneJob."""
        return key_of(self.body)

    @property
    def uid(self) -> str:
        """The uid of the FineTuneJob."""
        return str(self.body["metadata"]["uid"])

    @property
    def resource_version(self) -> str:
        """The version that a decision is based on, and that its writes require."""
        return str(self.body["metadata"]["resourceVersion"])


class Cache:
    """Keeps objects in memory; it is empty until the first resync."""

    def __init__(self) -> None:
        self._bodies: dict[Key, Raw] = {}
        self._jobs: dict[str, ChildJob] = {}  # by uid
        self._pods: dict[str, Pod] = {}  # by uid
        self._jobs_of: dict[str, set[str]] = defaultdict(set)  # FineTuneJob uid → Job uids
        self._pods_of: dict[str, set[str]] = defaultdict(set)  # Job uid → pod uids
        self._pods_labeled: dict[str, set[str]] = defaultdict(set)  # FineTuneJob uid → pod uids
        self._keys: dict[str, Key] = {}  # FineTuneJob uid → key
        self._deleted: dict[str, int] = {}  # uid → its last version, for late responses; see forget_deletions
        self._deleted_earlier: dict[str, int] = {}

    def snapshot(self, key: Key) -> JobSnapshot | None:
        """Returns a FineTuneJob with its children; None if it is unknown."""
        body = self._bodies.get(key)
        if body is None:
            return None
        uid = str(body["metadata"]["uid"])
        jobs = [self._jobs[job] for job in self._jobs_of.get(uid, ())]
        pods = {job.uid: [self._pods[pod] for pod in self._pods_of.get(job.uid, ())] for job in jobs}
        checks = objects.attempts((job for job in jobs if job.role == names.ROLE_PREFLIGHT), pods)
        return JobSnapshot(
            body=body,
            attempts=objects.attempts((job for job in jobs if job.role == names.ROLE_TRAINER), pods),
            preflight=checks[0] if checks else None,
            orphaned_pods=tuple(self._orphaned_pods(uid)),
        )

    def bodies(self) -> Iterator[Raw]:
        """Iterates over the raw bodies of all FineTuneJobs."""
        return iter(tuple(self._bodies.values()))

    def pod(self, uid: str) -> Pod | None:
        """Returns the pod with a uid; None if it is unknown."""
        return self._pods.get(uid)

    def owner_of(self, pod: Pod) -> tuple[Key, ChildJob] | None:
        """Returns the key of the FineTuneJob and the Job that own a pod; None if unknown."""
        job = self._jobs.get(pod.job_uid)
        key = self._keys.get(job.owner_uid) if job else None
        return (key, job) if key and job else None

    def sizes(self) -> dict[str, int]:
        """Returns the number of cached objects by resource."""
        return {names.PLURAL: len(self._bodies), "jobs": len(self._jobs), "pods": len(self._pods)}

    # -- updates -----------------------------------------------------------------------------------

    def put_body(self, body: Raw) -> Key:
        """Stores a FineTuneJob unless a newer version is cached, or it was deleted.

        Returns its key.
        """
        key = key_of(body)
        if self._was_deleted(body["metadata"]["uid"], _version(body)):
            return key
        cached = self._bodies.get(key)
        if cached is None or _version(cached) < _version(body):
            if cached is not None:
                self._keys.pop(cached["metadata"]["uid"], None)
            self._bodies[key] = body
            self._keys[body["metadata"]["uid"]] = key
        return key

    def drop_body(self, body: Raw) -> Key:
        """Removes a FineTuneJob unless another one of the same name has replaced it.

        Returns its key.
        """
        key = key_of(body)
        cached = self._bodies.get(key)
        self._record_deletion(body["metadata"]["uid"], _version(body))
        if cached is not None and cached["metadata"]["uid"] == body["metadata"]["uid"]:
            del self._bodies[key]
            self._keys.pop(cached["metadata"]["uid"], None)
        return key

    def put_job(self, raw: Raw) -> Key | None:
        """Stores a Job unless a newer version is cached, or it was deleted.

        Returns the key of the FineTuneJob that owns it; None if it is unknown.
        """
        job = objects.child_job(raw)
        if not job.owner_uid or self._was_deleted(job.uid, job.version):
            return None
        cached = self._jobs.get(job.uid)
        if cached is None or cached.version < job.version:
            self._jobs[job.uid] = job
            self._jobs_of[job.owner_uid].add(job.uid)
        return self._keys.get(job.owner_uid)

    def drop_job(self, uid: str, last_state: Raw | None = None) -> Key | None:
        """Removes a Job and its deleted pods. Returns the key of the FineTuneJob that owns it."""
        job = self._jobs.pop(uid, None)
        last = objects.child_job(last_state) if last_state else job
        if last is not None:
            self._record_deletion(uid, last.version)
        if job is None:
            return None
        _discard(self._jobs_of, job.owner_uid, uid)
        for pod in tuple(self._pods_of.get(uid, ())):
            if self._pods[pod].gone:
                self._remove_pod(pod)
        return self._keys.get(job.owner_uid)

    def put_pod(self, raw: Raw) -> Key | None:
        """Stores a pod unless a newer version is cached, or it was deleted.

        Returns the key of the FineTuneJob that it belongs to; None if it is unknown.
        """
        pod = objects.pod(raw)
        cached = self._pods.get(pod.uid)
        if self._was_deleted(pod.uid, pod.version) or (cached is not None and cached.gone):
            return self._keys.get(pod.owner_uid)
        if cached is None or cached.version < pod.version:
            self._store_pod(pod)
        return self._keys.get(pod.owner_uid)

    def drop_pod(self, uid: str, last_state: Raw | None = None) -> Key | None:
        """Marks a pod as deleted. Returns the key of the FineTuneJob that it belongs to.

        Its last state stays available while its Job exists, since it may show the root cause of a
        failure.
        """
        pod = objects.pod(last_state) if last_state else self._pods.get(uid)
        if pod is None:
            return None
        self._record_deletion(uid, pod.version)
        if pod.job_uid in self._jobs:
            self._store_pod(replace(pod, gone=True))
        else:
            self._remove_pod(uid)
        return self._keys.get(pod.owner_uid)

    # -- resync ------------------------------------------------------------------------------------

    def uids(self) -> dict[str, set[str]]:
        """Returns the uids of all cached objects by resource, for comparison with a list."""
        return {
            names.PLURAL: set(self._keys),
            "jobs": set(self._jobs),
            "pods": {uid for uid, pod in self._pods.items() if not pod.gone},
        }

    def drop_missing(self, kind: str, missing: Iterable[str]) -> set[Key]:
        """Removes objects that a resync no longer lists.

        Returns the keys of the affected FineTuneJobs.
        """
        affected: set[Key | None] = set()
        for uid in missing:
            if kind == names.PLURAL:
                key = self._keys.get(uid)
                affected.add(self.drop_body(self._bodies[key]) if key else None)
            elif kind == "jobs":
                affected.add(self.drop_job(uid))
            else:
                affected.add(self.drop_pod(uid))
        return {key for key in affected if key}

    def forget_deletions(self) -> None:
        """Forgets what was deleted before the previous call.

        Call it when a resync starts: by the next one, no response is under way any more that could
        contain an object which was deleted before this one.
        """
        self._deleted_earlier, self._deleted = self._deleted, {}

    # -- internals ---------------------------------------------------------------------------------

    def _orphaned_pods(self, uid: str) -> Iterator[Pod]:
        """Yields live pods whose Job is gone, by label, since they no longer have an owner."""
        for pod_uid in self._pods_labeled.get(uid, ()):
            pod = self._pods[pod_uid]
            if pod.is_live and pod.job_uid not in self._jobs:
                yield pod

    def _record_deletion(self, uid: str, version: int) -> None:
        """Remembers the newest version at which an object is known to be deleted."""
        self._deleted[uid] = max(version, self._deleted.get(uid, -1))

    def _was_deleted(self, uid: str, version: int) -> bool:
        """Whether an object was deleted at this version or a later one."""
        return version <= max(self._deleted.get(uid, -1), self._deleted_earlier.get(uid, -1))

    def _store_pod(self, pod: Pod) -> None:
        self._pods[pod.uid] = pod
        self._pods_of[pod.job_uid].add(pod.uid)
        self._pods_labeled[pod.owner_uid].add(pod.uid)

    def _remove_pod(self, uid: str) -> None:
        pod = self._pods.pop(uid, None)
        if pod is not None:
            _discard(self._pods_of, pod.job_uid, uid)
            _discard(self._pods_labeled, pod.owner_uid, uid)


def key_of(body: Raw) -> Key:
    """Returns the key of a FineTuneJob's raw body."""
    return (body["metadata"]["namespace"], body["metadata"]["name"])


def _version(body: Raw) -> int:
    return int(body["metadata"]["resourceVersion"])


def _discard(index: dict[str, set[str]], key: str, member: str) -> None:
    index[key].discard(member)
    if not index[key]:
        del index[key]
