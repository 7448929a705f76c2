"""act: carries out what decide wants: creates and deletes children, after a fresh look where it can't be undone.

Called by reconcile. Decides nothing. What the API server refuses comes back as one of four exceptions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from finetune_api import names
from finetune_operator import manifests
from finetune_operator.cache import Cache, Family
from finetune_operator.cluster import AlreadyExists, Cluster, Conflict, NotFound, Refused
from finetune_operator.decision import Action, CreateAttempt, CreatePreflight, DeleteJob
from finetune_operator.observe import Observed
from finetune_operator.plan import plan
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)


class OutOfDate(Exception):
    """The cache was behind; it is refreshed, and the decision has to be made again."""


class NameTaken(Exception):
    """A child's name belongs to somebody else."""


class SpecRefused(Exception):
    """The API server, or plan, can't carry out the spec; only another spec can change that."""


class Blocked(Exception):
    """The cluster refuses for now (a quota, a leftover that is going, a right that is missing)."""


class Hands:
    """Does it. One for all jobs."""

    def __init__(self, cluster: Cluster, cache: Cache, settings: Settings) -> None:
        self._cluster = cluster
        self._cache = cache
        self._settings = settings

    async def act(self, family: Family, seen: Observed, action: Action) -> None:
        """Raises OutOfDate, NameTaken, SpecRefused, Blocked, or cluster.Unavailable."""
        match action:
            case CreateAttempt():
                await self._create_attempt(family, seen, action)
            case CreatePreflight():
                await self._create_preflight(family, seen)
            case DeleteJob():
                await self._delete_job(seen, action)

    async def refresh(self, family: Family) -> None:
        """Puts the FineTuneJob as it is now into the cache."""
        meta = family.body["metadata"]
        try:
            self._cache.put_body(await self._cluster.get(names.PLURAL, meta["namespace"], meta["name"]))
        except NotFound:
            self._cache.drop_body(family.body)

    async def _create_attempt(self, family: Family, seen: Observed, action: CreateAttempt) -> None:
        run = plan(seen.job, self._settings, action.number)
        if not _is_new(seen):
            await self._confirm(family, with_children=action.number > 1)
        if run.world.nodes > 1:
            await self._create("services", manifests.service(seen.job), seen)
        await self._create("jobs", manifests.attempt_job(seen.job, run, self._settings, action.restarts), seen)

    async def _create_preflight(self, family: Family, seen: Observed) -> None:
        run = plan(seen.job, self._settings)
        if not _is_new(seen):
            await self._confirm(family, with_children=False)
        await self._create("jobs", manifests.preflight_job(seen.job, run, self._settings), seen)

    async def _confirm(self, family: Family, with_children: bool) -> None:
        """Nothing irreversible on the word of a cache: raises OutOfDate unless the API server says the same."""
        uid, version = family.uid, family.resource_version
        await self.refresh(family)
        now = self._cache.family((family.body["metadata"]["namespace"], family.body["metadata"]["name"]))
        if now is None or now.uid != uid or now.resource_version != version:
            raise OutOfDate
        if with_children and await self._children_differ(family):
            raise OutOfDate

    async def _children_differ(self, family: Family) -> bool:
        namespace = family.body["metadata"]["namespace"]
        jobs = await self._cluster.children("jobs", namespace, family.uid)
        pods = await self._cluster.children("pods", namespace, family.uid)
        for job in jobs:
            self._cache.put_job(job)
        for pod in pods:
            self._cache.put_pod(pod)
        known_jobs = {attempt.job.uid for attempt in family.attempts} | (
            {family.preflight.job.uid} if family.preflight else set()
        )
        gone = known_jobs - {job["metadata"]["uid"] for job in jobs}
        self._cache.drop_missing("jobs", gone)
        now = self._cache.family((namespace, family.body["metadata"]["name"]))
        return now is None or _shape(now) != _shape(family)

    async def _create(self, resource: str, manifest: Mapping[str, Any], seen: Observed) -> None:
        meta = manifest["metadata"]
        made: Mapping[str, Any]
        try:
            made = await self._cluster.create(resource, manifest)
            log.info(
                "created %s %s", manifest["kind"], meta["name"], extra={"job": meta["labels"][names.LABEL_JOB_NAME]}
            )
        except AlreadyExists:
            made = await self._ours(resource, manifest, seen)
        except NotFound as error:
            raise OutOfDate from error
        except Refused as error:
            if error.code == 403:
                raise Blocked(error.message) from error
            raise SpecRefused(error.message) from error
        if resource == "jobs":
            self._cache.put_job(made)

    async def _ours(self, resource: str, manifest: Mapping[str, Any], seen: Observed) -> Mapping[str, Any]:
        """What has the name already: ours (we crashed after creating it), going, or somebody else's."""
        meta, what = manifest["metadata"], f"{manifest['kind']} {manifest['metadata']['name']}"
        try:
            there = await self._cluster.get(resource, meta["namespace"], meta["name"])
        except NotFound as error:
            raise OutOfDate from error
        owner = _controller(there)
        if owner.get("uid") == seen.job.metadata.uid:
            if "deletionTimestamp" in there["metadata"]:
                raise Blocked(f"{what} is being deleted; it is created again when it is gone")
            return there
        if owner.get("kind") == names.KIND and owner.get("name") == seen.job.metadata.name:
            raise Blocked(f"{what} of a deleted FineTuneJob of the same name is still there; waits until it is gone")
        owned = f"{owner.get('kind')} {owner.get('name')}" if owner else "nobody"
        raise NameTaken(
            f"{what} is needed, but exists and belongs to {owned}; rename the FineTuneJob or remove the {resource[:-1]}"
        )

    async def _delete_job(self, seen: Observed, action: DeleteJob) -> None:
        namespace = seen.job.metadata.namespace
        preconditions = {"uid": action.uid, "resourceVersion": action.resource_version}
        try:
            left = await self._cluster.delete("jobs", namespace, action.name, preconditions, action.wait)
            log.info("deleted Job %s", action.name, extra={"job": seen.job.metadata.name})
        except NotFound:
            self._cache.drop_job(action.uid)
            return
        except Conflict as error:
            await self._refresh_job(namespace, action)
            raise OutOfDate from error
        if left.get("kind") == "Job":
            self._cache.put_job(left)
        else:
            self._cache.drop_job(action.uid)

    async def _refresh_job(self, namespace: str, action: DeleteJob) -> None:
        try:
            self._cache.put_job(await self._cluster.get("jobs", namespace, action.name))
        except NotFound:
            self._cache.drop_job(action.uid)


def _is_new(seen: Observed) -> bool:
    """Nobody has said a word of it yet. Its first child needs no second look: if it exists already, its name says so;
    if the FineTuneJob is gone, the garbage collector takes the child of an owner that isn't there."""
    return seen.job.status.observed_generation == 0


def _shape(family: Family) -> tuple[object, ...]:
    """What a decision about a new attempt rests on."""
    children = [*family.attempts, *([family.preflight] if family.preflight else [])]
    return (
        tuple((child.job.uid, child.job.is_finished, child.job.deleting, child.is_live) for child in children),
        tuple(sorted(pod.uid for pod in family.strays)),
    )


def _controller(body: Mapping[str, Any]) -> Mapping[str, Any]:
    owners = body["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), {})
