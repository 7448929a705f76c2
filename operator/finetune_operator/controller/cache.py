"""Caches the last known state of all FineTuneJobs, their Jobs and their pods.

It is fed by watches, by lists and by the responses to our own writes, and never talks to the API
server itself. An older version never replaces a newer one, and never brings a deleted object back,
so the order in which they arrive doesn't matter.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from finetune_api import names
from finetune_api import untrusted as u
from finetune_operator.controller.snapshot import JobSnapshot, Key, Owner, Raw, key_of
from finetune_operator.core import objects, parsing
from finetune_operator.core.objects import ChildJob, Pod

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Cache:
    """Keeps objects in memory; it is empty until the first resync."""

    def __init__(self) -> None:
        self._bodies: dict[Key, Raw] = {}
        self._jobs: dict[str, ChildJob] = {}  # by uid
        self._pods: dict[str, Pod] = {}  # by uid
        self._jobs_of: dict[Owner, set[str]] = defaultdict(set)  # FineTuneJob → Job uids
        self._pods_of: dict[Owner, set[str]] = defaultdict(set)  # Job → pod uids
        self._pods_labeled: dict[Owner, set[str]] = defaultdict(set)  # FineTuneJob → pod uids
        self._pods_named: dict[Owner, set[str]] = defaultdict(set)  # namespace and name of it → pod uids
        self._keys: dict[str, Key] = {}  # FineTuneJob uid → key
        self._deleted: dict[str, int] = {}  # uid → its last version, for late responses; see forget_deletions
        self._deleted_earlier: dict[str, int] = {}

    def snapshot(self, key: Key) -> JobSnapshot | None:
        """Returns a FineTuneJob with its children; None if it is unknown."""
        body = self._bodies.get(key)
        if body is None:
            return None
        owner = (key[0], str(body["metadata"]["uid"]))
        jobs, strangers = self._children(owner, key[1], body)
        pods = {job.uid: [self._pods[pod] for pod in self._pods_of.get((key[0], job.uid), ())] for job in jobs}
        checks = objects.attempts((job for job in jobs if job.role == names.ROLE_PREFLIGHT), pods)
        cleanups = objects.attempts((job for job in jobs if job.role == names.ROLE_CLEANUP), pods)
        return JobSnapshot(
            body=body,
            attempts=objects.attempts((job for job in jobs if job.role == names.ROLE_TRAINER), pods),
            preflight=checks[0] if checks else None,
            cleanup=cleanups[0] if cleanups else None,
            orphaned_pods=tuple(self._orphaned_pods(owner, key, {job.uid for job in jobs}, strangers)),
        )

    def bodies(self) -> Iterator[Raw]:
        """Iterates over the raw bodies of all FineTuneJobs."""
        return iter(tuple(self._bodies.values()))

    def pods(self) -> Iterator[Pod]:
        """Iterates over all pods."""
        return iter(tuple(self._pods.values()))

    def pod(self, uid: str) -> Pod | None:
        """Returns the pod with a uid; None if it is unknown."""
        return self._pods.get(uid)

    def owner_of(self, pod: Pod) -> tuple[Key, ChildJob] | None:
        """Returns the key of the FineTuneJob and the Job that own a pod; None if unknown."""
        job = self._jobs.get(pod.job_uid)
        key = self._key(job.namespace, job.owner_uid) if job and job.namespace == pod.namespace else None
        return (key, job) if key and job else None

    def sizes(self) -> dict[str, int]:
        """Returns the number of cached objects by resource."""
        return {names.PLURAL: len(self._bodies), "jobs": len(self._jobs), "pods": len(self._pods)}

    # -- updates -----------------------------------------------------------------------------------

    def put_body(self, body: Raw) -> Key:
        """Stores a FineTuneJob unless a newer one is cached, or it was deleted. Returns its key."""
        key = key_of(body)
        if self._was_deleted(body["metadata"]["uid"], _version(body)):
            return key
        cached = self._bodies.get(key)
        if cached is None or _version(cached) < _version(body):
            if cached is not None:
                self._keys.pop(cached["metadata"]["uid"], None)
            self._bodies[key] = _without_managed_fields(body)
            self._keys[body["metadata"]["uid"]] = key
        return key

    def drop_body(self, body: Raw) -> Key:
        """Removes a FineTuneJob unless another one of its name has replaced it. Returns its key."""
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
        job = _parsed(parsing.child_job, raw)
        if job is None or not job.owner_uid or self._was_deleted(job.uid, job.version):
            return None
        cached = self._jobs.get(job.uid)
        if cached is None or cached.version < job.version:
            self._jobs[job.uid] = job
            if cached is not None and cached.owner_uid != job.owner_uid:
                _discard(self._jobs_of, (cached.namespace, cached.owner_uid), job.uid)
            self._jobs_of[job.namespace, job.owner_uid].add(job.uid)
        return self._key(job.namespace, job.owner_uid)

    def drop_job(self, uid: str, last_state: Raw | None = None) -> Key | None:
        """Removes a Job and its deleted pods. Returns the key of the FineTuneJob that owns it."""
        job = self._jobs.pop(uid, None)
        last = _parsed(parsing.child_job, last_state) if last_state else job
        if last is not None:
            self._record_deletion(uid, last.version)
        if job is None:
            return None
        _discard(self._jobs_of, (job.namespace, job.owner_uid), uid)
        for pod in tuple(self._pods_of.get((job.namespace, uid), ())):
            if self._pods[pod].gone:
                self._remove_pod(pod)
        return self._key(job.namespace, job.owner_uid)

    def put_pod(self, raw: Raw) -> Key | None:
        """Stores a pod unless a newer version is cached, or it was deleted.

        Returns the key of the FineTuneJob that it belongs to; None if it is unknown.
        """
        pod = _parsed(parsing.pod, raw)
        if pod is None:
            return None
        cached = self._pods.get(pod.uid)
        if self._was_deleted(pod.uid, pod.version):
            return self._key_of_pod(pod)
        if cached is None or cached.version < pod.version:
            self._store_pod(pod)
        return self._key_of_pod(self._pods[pod.uid])

    def put_unwatched_pod(self, raw: Raw, owner_uid: str) -> None:
        """Stores a pod of a FineTuneJob that was just read but that no watch reports."""
        pod = _parsed(parsing.pod, raw)
        if pod is not None:
            self._deleted.pop(pod.uid, None)
            self._deleted_earlier.pop(pod.uid, None)
            self._store_pod(replace(pod, owner_uid=owner_uid, unwatched=True))

    def drop_pod(self, uid: str, last_state: Raw | None = None) -> Key | None:
        """Marks a pod as deleted. Returns the key of the FineTuneJob that it belongs to.

        Its last state stays available while its Job exists, since it may show the root cause of a
        failure. A pod that nobody has asked to stop may only have lost the label that the watch
        selects; it counts as running until it has been looked up.
        """
        pod = (_parsed(parsing.pod, last_state) if last_state else None) or self._pods.get(uid)
        if pod is None:
            return None
        key = self._key_of_pod(pod)
        if last_state is not None and pod.is_live and not pod.deleting:
            self._store_pod(replace(pod, unwatched=True))
            return key
        self._record_deletion(uid, pod.version)
        if pod.job_uid in self._jobs:
            self._store_pod(replace(pod, gone=True))
        else:
            self._remove_pod(uid)
        return key

    # -- resync ------------------------------------------------------------------------------------

    def uids(self) -> dict[str, set[str]]:
        """Returns the uids of all cached objects by resource, for comparison with a list."""
        return {
            names.PLURAL: set(self._keys),
            "jobs": set(self._jobs),
            "pods": {uid for uid, pod in self._pods.items() if not pod.gone and not pod.unwatched},
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

    def _children(self, owner: Owner, name: str, body: Raw) -> tuple[list[ChildJob], set[str]]:
        """Returns the Jobs that are proven to be the FineTuneJob's children, and the uids of those
        that only claim to be."""
        status = body.get("status")
        newest = 1 + u.integer(status.get("attempt") if isinstance(status, Mapping) else 0)
        jobs = [self._jobs[uid] for uid in self._jobs_of.get(owner, ())]
        proven = [job for job in jobs if job.owner_name == name and job.attempt <= newest]
        return proven, {job.uid for job in jobs} - {job.uid for job in proven}

    def _orphaned_pods(self, owner: Owner, key: Key, proven: set[str], strangers: set[str]) -> Iterator[Pod]:
        """Yields live pods that no proven Job controls, but that may be the job's: by their label,
        since they may no longer have an owner, by a Job that claims to be a child, or by their
        name, if their FineTuneJob is gone: it may have been the job's predecessor."""
        controlled = {pod for job in strangers for pod in self._pods_of.get((owner[0], job), ())}
        named = {pod for pod in self._pods_named.get(key, ()) if not self._key(key[0], self._pods[pod].owner_uid)}
        for pod_uid in sorted(controlled | self._pods_labeled.get(owner, set()) | named):
            pod = self._pods[pod_uid]
            if pod.is_live and pod.job_uid not in proven:
                yield pod

    def _key(self, namespace: str, uid: str) -> Key | None:
        """Returns the key of the FineTuneJob with a uid; None if it is in another namespace."""
        key = self._keys.get(uid)
        return key if key and key[0] == namespace else None

    def _key_of_pod(self, pod: Pod) -> Key | None:
        owner, named = self.owner_of(pod), (pod.namespace, pod.job_name)
        key = owner[0] if owner else self._key(pod.namespace, pod.owner_uid)
        return key or (named if named in self._bodies else None)

    def _record_deletion(self, uid: str, version: int) -> None:
        """Remembers the newest version at which an object is known to be deleted."""
        self._deleted[uid] = max(version, self._deleted.get(uid, -1))

    def _was_deleted(self, uid: str, version: int) -> bool:
        """Whether an object was deleted at this version or a later one."""
        return version <= max(self._deleted.get(uid, -1), self._deleted_earlier.get(uid, -1))

    def _store_pod(self, pod: Pod) -> None:
        """Stores a pod. It stays the pod of the owners that it was first seen with: an editor may
        have changed its labels, or the garbage collector may have orphaned it."""
        cached = self._pods.get(pod.uid)
        if cached is not None:
            pod = replace(pod, job_uid=cached.job_uid or pod.job_uid, owner_uid=cached.owner_uid or pod.owner_uid)
        self._pods[pod.uid] = pod
        self._pods_of[pod.namespace, pod.job_uid].add(pod.uid)
        self._pods_labeled[pod.namespace, pod.owner_uid].add(pod.uid)
        self._pods_named[pod.namespace, pod.job_name].add(pod.uid)

    def _remove_pod(self, uid: str) -> None:
        pod = self._pods.pop(uid, None)
        if pod is not None:
            _discard(self._pods_of, (pod.namespace, pod.job_uid), uid)
            _discard(self._pods_labeled, (pod.namespace, pod.owner_uid), uid)
            _discard(self._pods_named, (pod.namespace, pod.job_name), uid)


def _without_managed_fields(body: Raw) -> Raw:
    """Returns a body without the record of who set which field, which is as large as its spec."""
    return {**body, "metadata": {key: value for key, value in body["metadata"].items() if key != "managedFields"}}


def _parsed(parse: Callable[[Raw], _T], raw: Raw) -> _T | None:
    """Returns an object's value; None, with a warning, for an object that can't be read."""
    try:
        return parse(raw)
    except parsing.Unreadable as error:
        log.warning("object ignored: %s", error)
        return None


def _version(body: Raw) -> int:
    return int(body["metadata"]["resourceVersion"])


def _discard(index: dict[Owner, set[str]], key: Owner, member: str) -> None:
    if key not in index:
        return
    index[key].discard(member)
    if not index[key]:
        del index[key]
