"""Carries out the actions of a decision: creates and deletes the children of a FineTuneJob.

Before anything irreversible, it compares the cache with the API server. It decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from finetune_api import names
from finetune_operator.controller import ownership
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.creator import Creator
from finetune_operator.controller.deletion.finalizer import Finalizer
from finetune_operator.controller.snapshot import JobSnapshot
from finetune_operator.core import output
from finetune_operator.core.actions import (
    Action,
    Blocked,
    CreateAttempt,
    CreatePreflight,
    DeleteJob,
    NameTaken,
    OutOfDate,
    ReleaseGroup,
    ResumeGroup,
    SpecRefused,
)
from finetune_operator.core.objects import ChildJob, Observed
from finetune_operator.core.plan import model_bytes, plan
from finetune_operator.core.pods import manifests
from finetune_operator.core.status import timestamp
from finetune_operator.kube.client import Conflict, KubeClient, NotFound, Refused
from finetune_operator.kube.server_clock import ServerClock
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

_GARBAGE_COLLECTION = {"foregroundDeletion", "orphan"}  # finalizers of Kubernetes itself
_SINGLE_READS = 3  # of pods; more of them are listed


class Executor:
    """Carries out the actions of all jobs."""

    def __init__(
        self,
        client: KubeClient,
        cache: Cache,
        settings: Settings,
        finalizer: Finalizer,
        clock: ServerClock | None = None,
    ) -> None:
        self._client = client
        self._clock = clock or ServerClock()
        self._finalizer = finalizer
        self._cache = cache
        self._settings = settings
        self._creator = Creator(client, cache, settings)
        self._services_read: dict[str, float] = {}  # by uid of the FineTuneJob (monotonic)

    async def act(self, snapshot: JobSnapshot, observed: Observed, action: Action) -> None:
        """Carries out one action.

        Raises OutOfDate, NameTaken, SpecRefused, Blocked, core.plan.PlanError,
        core.pods.offers.NotOffered or kube.client.Unavailable.
        """
        match action:
            case CreateAttempt():
                await self._create_attempt(snapshot, observed, action)
            case CreatePreflight():
                await self._create_preflight(snapshot, observed)
            case DeleteJob():
                await self._delete_job(observed, action)
            case ReleaseGroup():
                annotations = {
                    names.ANNOTATION_RELEASED_AT: timestamp(action.at),
                    names.ANNOTATION_RELEASES: str(action.releases),
                }
                await self._suspend_job(observed, action, annotations, suspend=True)
            case ResumeGroup():
                await self._suspend_job(observed, action, {names.ANNOTATION_RELEASED_AT: None}, suspend=False)

    async def refresh(self, snapshot: JobSnapshot) -> None:
        """Reads the FineTuneJob from the API server into the cache."""
        meta = snapshot.body["metadata"]
        try:
            self._cache.put_body(await self._client.get(names.PLURAL, meta["namespace"], meta["name"]))
        except NotFound:
            self._cache.drop_body(snapshot.body)

    async def look_up(self, snapshot: JobSnapshot) -> bool:
        """Reads the live pods that no watch reports. Returns whether there were any."""
        unwatched = {pod.uid: pod for pod in snapshot.pods if pod.unwatched and pod.is_live}
        if not unwatched:
            return False
        namespace, _ = snapshot.key
        existing: dict[str, Mapping[str, Any]] = {}
        if len(unwatched) > _SINGLE_READS:
            listed = await self._client.matching("pods", namespace, lambda raw: raw["metadata"]["uid"] in unwatched)
            existing = {raw["metadata"]["uid"]: raw for raw in listed}
        else:
            for pod in unwatched.values():
                with contextlib.suppress(NotFound):
                    raw = await self._client.get("pods", namespace, pod.name)
                    existing[raw["metadata"]["uid"]] = raw
        for uid in unwatched:
            if uid in existing:
                self._cache.put_unwatched_pod(existing[uid], snapshot.uid)
            else:
                self._cache.drop_pod(uid)
        return True

    async def end(self, snapshot: JobSnapshot) -> None:
        """Deletes the Jobs of a FineTuneJob that a finalizer of somebody else keeps from vanishing.

        Else the garbage collector deletes them, or leaves them if that was asked for.
        """
        if not set(snapshot.body["metadata"].get("finalizers") or ()) - _GARBAGE_COLLECTION:
            return
        children = [*snapshot.attempts, *([snapshot.preflight] if snapshot.preflight else [])]
        for job in (child.job for child in children if not child.job.deleting):
            preconditions = {"uid": job.uid, "resourceVersion": job.resource_version}
            try:
                await self._client.delete("jobs", job.namespace, job.name, preconditions, wait=True)
                log.info("deleted Job %s of a deleted FineTuneJob", job.name)
            except NotFound:
                self._cache.drop_job(job.uid)
            except Conflict:
                await self._look_up_child(snapshot, job)

    async def _look_up_child(self, snapshot: JobSnapshot, job: ChildJob) -> None:
        """Reads a Job that has changed; one that was orphaned meanwhile is no child any more."""
        try:
            raw = await self._client.get("jobs", job.namespace, job.name)
        except NotFound:
            self._cache.drop_job(job.uid)
            return
        if ownership.controller_of(raw).get("uid") == snapshot.uid:
            self._cache.put_job(raw)
        else:
            self._cache.drop_job(job.uid)

    async def create_cleanup(self, observed: Observed) -> None:
        """Creates the Job that deletes what a deleted FineTuneJob leaves.

        Raises as `act` does.
        """
        await self._creator.check_offered(observed)
        run = output.with_origin(plan(observed.job, self._settings), observed).model_copy(update={"progress": None})
        with contextlib.suppress(NameTaken):  # by the job's own, which was orphaned and still closes its pods
            await self._creator.close_pods(observed, first=False)
        await self._creator.create("jobs", manifests.cleanup_job(observed.job, run, self._settings), observed)

    def forget(self, uid: str) -> None:
        """Removes what is known about a job that is gone."""
        self._services_read.pop(uid, None)

    async def restore_service(self, observed: Observed, interval: float) -> None:
        """Creates the Service of a group again if somebody has deleted it; it is read at most every
        `interval` seconds, however often the job is reconciled."""
        meta = observed.job.metadata
        if time.monotonic() - self._services_read.get(meta.uid, -interval) < interval:
            return
        self._services_read[meta.uid] = time.monotonic()
        name = names.service_name(meta.name)
        try:
            await self._client.get("services", meta.namespace, name)
        except NotFound:
            log.warning("Service %s was deleted", name, extra={"namespace": meta.namespace, "job": meta.name})
            with contextlib.suppress(NameTaken, SpecRefused, Blocked, OutOfDate):
                await self._creator.create("services", manifests.service(observed.job), observed)
        except Refused as error:
            log.warning("Service %s can't be read: %s", name, error)

    async def _create_attempt(self, snapshot: JobSnapshot, observed: Observed, action: CreateAttempt) -> None:
        self._finalizer.require(snapshot, observed.job)
        await self._creator.check_offered(observed)
        size, memory_restarts = model_bytes(observed), action.restarts.memory
        run = output.with_origin(plan(observed.job, self._settings, action.number, size, memory_restarts), observed)
        run = self._creator.completed(run, observed, self._clock.now())
        if not _is_new(observed):
            await self._confirm(snapshot, with_children=action.number > 1)
        manifest = manifests.attempt_job(observed.job, run, self._settings, action.restarts, action.avoided_nodes)
        before = [self._creator.close_pods(observed, first=_is_new(observed))]
        if run.world.nodes > 1:
            before.append(self._creator.create("services", manifests.service(observed.job), observed))
            manifest = manifests.with_rendezvous_secret(manifest, secrets.token_hex(32))
        await asyncio.gather(*before)  # pods that exist are closed to others, and have a name
        await self._creator.create("jobs", manifest, observed)

    async def _create_preflight(self, snapshot: JobSnapshot, observed: Observed) -> None:
        self._finalizer.require(snapshot, observed.job)
        await self._creator.check_offered(observed)
        run = output.with_origin(plan(observed.job, self._settings), observed)
        run = self._creator.completed(run, observed, self._clock.now())
        if not _is_new(observed):
            await self._confirm(snapshot, with_children=False)
        await self._creator.close_pods(observed, first=_is_new(observed))
        await self._creator.create("jobs", manifests.preflight_job(observed.job, run, self._settings), observed)

    async def _confirm(self, snapshot: JobSnapshot, with_children: bool) -> None:
        """Compares the snapshot with the API server, before anything irreversible.

        Raises OutOfDate if they differ.
        """
        uid, version = snapshot.uid, snapshot.resource_version
        await self.refresh(snapshot)
        current = self._cache.snapshot(snapshot.key)
        if current is None or current.uid != uid or current.resource_version != version:
            raise OutOfDate
        if with_children and await self._children_differ(snapshot):
            raise OutOfDate

    async def _children_differ(self, snapshot: JobSnapshot) -> bool:
        """Whether the children aren't those of the snapshot, wherever their labels point."""
        namespace, _ = snapshot.key
        jobs = await self._client.matching(
            "jobs", namespace, lambda raw: ownership.controller_of(raw).get("uid") == snapshot.uid
        )
        cached_jobs = {attempt.job.uid for attempt in snapshot.attempts} | (
            {snapshot.preflight.job.uid} if snapshot.preflight else set()
        )
        owners = cached_jobs | {job["metadata"]["uid"] for job in jobs}
        pods = await self._client.matching("pods", namespace, lambda raw: ownership.may_be_of(raw, snapshot, owners))
        for job in jobs:
            self._cache.put_job(job)
        for pod in pods:
            if ownership.is_unwatched(pod):
                self._cache.put_unwatched_pod(pod, snapshot.uid)
            else:
                self._cache.put_pod(pod)
        missing = cached_jobs - {job["metadata"]["uid"] for job in jobs}
        self._cache.drop_missing("jobs", missing)
        current = self._cache.snapshot(snapshot.key)
        return current is None or ownership.fingerprint(current) != ownership.fingerprint(snapshot)

    async def _delete_job(self, observed: Observed, action: DeleteJob) -> None:
        namespace = observed.job.metadata.namespace
        preconditions = {"uid": action.uid, "resourceVersion": action.resource_version}
        try:
            remaining = await self._client.delete("jobs", namespace, action.name, preconditions, action.wait)
            log.info("deleted Job %s", action.name, extra={"job": observed.job.metadata.name})
        except NotFound:
            self._cache.drop_job(action.uid)
            return
        except Conflict as error:
            await self._refresh_job(namespace, action)
            raise OutOfDate from error
        if remaining.get("kind") == "Job":
            self._cache.put_job(remaining)
        else:
            self._cache.drop_job(action.uid)

    async def _suspend_job(
        self,
        observed: Observed,
        action: ReleaseGroup | ResumeGroup,
        annotations: Mapping[str, str | None],
        *,
        suspend: bool,
    ) -> None:
        """Suspends or resumes a Job, and changes its annotations with the same request."""
        namespace = observed.job.metadata.namespace
        meta = {"uid": action.uid, "resourceVersion": action.resource_version, "annotations": annotations}
        try:
            job = await self._client.patch(
                "jobs", namespace, action.name, {"metadata": meta, "spec": {"suspend": suspend}}
            )
        except NotFound as error:
            self._cache.drop_job(action.uid)
            raise OutOfDate from error
        except Conflict as error:
            await self._refresh_job(namespace, action)
            raise OutOfDate from error
        what = "suspended" if suspend else "resumed"
        log.info("%s Job %s", what, action.name, extra={"job": observed.job.metadata.name})
        self._cache.put_job(job)

    async def _refresh_job(self, namespace: str, action: DeleteJob | ReleaseGroup | ResumeGroup) -> None:
        try:
            self._cache.put_job(await self._client.get("jobs", namespace, action.name))
        except NotFound:
            self._cache.drop_job(action.uid)


def _is_new(observed: Observed) -> bool:
    """Whether no status has been written yet.

    The first child can be created without comparing the cache with the API server: if the child
    exists already, creating it fails; if the FineTuneJob is gone, the garbage collector deletes
    the child.
    """
    return observed.job.status.observed_generation == 0
