"""cache: the last known state of all FineTuneJobs, their Jobs and pods, as the watches and our own writes tell it.

Written by doors, the sweep and reconcile; read by reconcile, progress and metrics. Never talks to the cluster. An older
version never replaces a newer one, so the order in which news arrive doesn't matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune_api import names
from finetune_operator import observe
from finetune_operator.observe import Attempt, ChildJob, Pod

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A FineTuneJob's raw body and its children, matched by owner uid."""

    body: Raw
    attempts: tuple[Attempt, ...]
    preflight: Attempt | None
    strays: tuple[Pod, ...]

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    @property
    def resource_version(self) -> str:
        return str(self.body["metadata"]["resourceVersion"])


class Cache:
    """In memory; empty until the first sweep."""

    def __init__(self) -> None:
        self._bodies: dict[Key, Raw] = {}
        self._jobs: dict[str, ChildJob] = {}  # by uid
        self._pods: dict[str, Pod] = {}  # by uid
        self._jobs_of: dict[str, set[str]] = defaultdict(set)  # FineTuneJob uid → Job uids
        self._pods_of: dict[str, set[str]] = defaultdict(set)  # Job uid → pod uids
        self._pods_labelled: dict[str, set[str]] = defaultdict(set)  # FineTuneJob uid → pod uids
        self._keys: dict[str, Key] = {}  # FineTuneJob uid → key

    def family(self, key: Key) -> Family | None:
        """A FineTuneJob with its children, or None where it is unknown."""
        body = self._bodies.get(key)
        if body is None:
            return None
        uid = str(body["metadata"]["uid"])
        jobs = [self._jobs[job] for job in self._jobs_of.get(uid, ())]
        pods = {job.uid: [self._pods[pod] for pod in self._pods_of.get(job.uid, ())] for job in jobs}
        checks = observe.attempts((job for job in jobs if job.role == names.ROLE_PREFLIGHT), pods)
        return Family(
            body=body,
            attempts=observe.attempts((job for job in jobs if job.role == names.ROLE_TRAINER), pods),
            preflight=checks[0] if checks else None,
            strays=tuple(self._strays(uid)),
        )

    def bodies(self) -> Iterator[Raw]:
        """All FineTuneJobs."""
        return iter(tuple(self._bodies.values()))

    def keys(self) -> tuple[Key, ...]:
        return tuple(self._bodies)

    def pod(self, uid: str) -> Pod | None:
        return self._pods.get(uid)

    def owner_of(self, pod: Pod) -> tuple[Key, ChildJob] | None:
        """The FineTuneJob and the Job that a pod belongs to, by owner uids."""
        job = self._jobs.get(pod.job_uid)
        key = self._keys.get(job.owner_uid) if job else None
        return (key, job) if key and job else None

    def sizes(self) -> dict[str, int]:
        return {names.PLURAL: len(self._bodies), "jobs": len(self._jobs), "pods": len(self._pods)}

    # -- news ------------------------------------------------------------------------------------------------------

    def put_body(self, body: Raw) -> Key:
        """A FineTuneJob as it was read, or as our write left it."""
        key = key_of(body)
        known = self._bodies.get(key)
        if known is None or _version(known) < _version(body):
            if known is not None:
                self._keys.pop(known["metadata"]["uid"], None)
            self._bodies[key] = body
            self._keys[body["metadata"]["uid"]] = key
        return key

    def drop_body(self, body: Raw) -> Key:
        key = key_of(body)
        known = self._bodies.get(key)
        if known is not None and known["metadata"]["uid"] == body["metadata"]["uid"]:
            del self._bodies[key]
            self._keys.pop(known["metadata"]["uid"], None)
        return key

    def put_job(self, raw: Raw) -> Key | None:
        """Returns the FineTuneJob's key, where its owner is known."""
        job = observe.child_job(raw)
        if not job.owner_uid:
            return None
        known = self._jobs.get(job.uid)
        if known is None or known.version < job.version:
            self._jobs[job.uid] = job
            self._jobs_of[job.owner_uid].add(job.uid)
        return self._keys.get(job.owner_uid)

    def drop_job(self, uid: str) -> Key | None:
        job = self._jobs.pop(uid, None)
        if job is None:
            return None
        _discard(self._jobs_of, job.owner_uid, uid)
        for pod in tuple(self._pods_of.get(uid, ())):
            if self._pods[pod].gone:
                self._forget_pod(pod)
        return self._keys.get(job.owner_uid)

    def put_pod(self, raw: Raw) -> Key | None:
        pod = observe.pod(raw)
        known = self._pods.get(pod.uid)
        if known is None or (known.version < pod.version and not known.gone):
            self._remember_pod(pod)
        return self._keys.get(pod.owner_uid)

    def drop_pod(self, uid: str, last: Raw | None = None) -> Key | None:
        """What a deleted pod left as its last word is kept while its Job exists: it may be the group's cause."""
        pod = observe.pod(last) if last else self._pods.get(uid)
        if pod is None:
            return None
        if pod.job_uid in self._jobs:
            self._remember_pod(replace(pod, gone=True))
        else:
            self._forget_pod(uid)
        return self._keys.get(pod.owner_uid)

    # -- sweep -----------------------------------------------------------------------------------------------------

    def uids(self) -> dict[str, set[str]]:
        """What is known, by kind; taken before a sweep lists, and compared with what it found."""
        return {
            names.PLURAL: set(self._keys),
            "jobs": set(self._jobs),
            "pods": {uid for uid, pod in self._pods.items() if not pod.gone},
        }

    def drop_missing(self, kind: str, missing: Iterable[str]) -> set[Key]:
        """Forgets what a sweep no longer found; returns the FineTuneJobs concerned."""
        concerned: set[Key | None] = set()
        for uid in missing:
            if kind == names.PLURAL:
                key = self._keys.get(uid)
                concerned.add(self.drop_body(self._bodies[key]) if key else None)
            elif kind == "jobs":
                concerned.add(self.drop_job(uid))
            else:
                concerned.add(self.drop_pod(uid))
        return {key for key in concerned if key}

    # -- inside ----------------------------------------------------------------------------------------------------

    def _strays(self, uid: str) -> Iterator[Pod]:
        """Live pods of a FineTuneJob whose Job is gone; by label, since an orphaned pod has no owner any more."""
        for pod_uid in self._pods_labelled.get(uid, ()):
            pod = self._pods[pod_uid]
            if pod.is_live and pod.job_uid not in self._jobs:
                yield pod

    def _remember_pod(self, pod: Pod) -> None:
        self._pods[pod.uid] = pod
        self._pods_of[pod.job_uid].add(pod.uid)
        self._pods_labelled[pod.owner_uid].add(pod.uid)

    def _forget_pod(self, uid: str) -> None:
        pod = self._pods.pop(uid, None)
        if pod is not None:
            _discard(self._pods_of, pod.job_uid, uid)
            _discard(self._pods_labelled, pod.owner_uid, uid)


def key_of(body: Raw) -> Key:
    return (body["metadata"]["namespace"], body["metadata"]["name"])


def _version(body: Raw) -> int:
    return int(body["metadata"]["resourceVersion"])


def _discard(index: dict[str, set[str]], key: str, member: str) -> None:
    index[key].discard(member)
    if not index[key]:
        del index[key]
