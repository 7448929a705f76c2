"""Adds the operator's finalizer to FineTuneJobs whose output is cleaned when they are deleted, and
removes it. It decides nothing else."""

from __future__ import annotations

import logging
import time
from typing import Any

from finetune_api import names
from finetune_api.resource import FineTuneJob
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.snapshot import JobSnapshot, Key
from finetune_operator.core.actions import Blocked, OutOfDate
from finetune_operator.kube.client import Conflict, KubeClient, NotFound, Refused

log = logging.getLogger(__name__)

_REFUSED_SECONDS = 60.0  # until a change that the API server refuses is tried again


class Finalizer:
    """Changes the finalizers of all jobs."""

    def __init__(self, client: KubeClient, cache: Cache) -> None:
        self._client = client
        self._cache = cache
        self._refused_until: dict[Key, float] = {}  # monotonic

    async def follow(self, snapshot: JobSnapshot, job: FineTuneJob) -> None:
        """Gives a job the finalizer if its deletion policy needs one, and takes it away otherwise.

        Raises OutOfDate if it changed something. What the API server refuses is tried again later.
        """
        needed = job.spec.output.deletion_policy != "Retain"
        if needed == has_finalizer(snapshot) or time.monotonic() < self._refused_until.get(snapshot.key, 0.0):
            return
        try:
            await self._change(snapshot, add=needed)
        except Refused as error:
            self._refused_until[snapshot.key] = time.monotonic() + _REFUSED_SECONDS
            log.warning("finalizer refused: %s", error, extra={"namespace": snapshot.key[0], "job": snapshot.key[1]})
            return
        raise OutOfDate

    def require(self, snapshot: JobSnapshot, job: FineTuneJob) -> None:
        """Raises Blocked if pods could store something that the deletion of the job wouldn't
        reach."""
        if job.spec.output.deletion_policy != "Retain" and not has_finalizer(snapshot):
            raise Blocked(
                f"output.deletionPolicy is {job.spec.output.deletion_policy}, and the operator may not add its "
                "finalizer: upgrade the chart, or set deletionPolicy to Retain"
            )

    async def remove(self, snapshot: JobSnapshot) -> None:
        """Removes the finalizer. Raises OutOfDate if the job has changed, or Refused."""
        await self._change(snapshot, add=False)

    def forget(self, key: Key) -> None:
        """Removes what is known of a job that is gone."""
        self._refused_until.pop(key, None)

    async def _change(self, snapshot: JobSnapshot, *, add: bool) -> None:
        namespace, name = snapshot.key
        others = [entry for entry in finalizers(snapshot) if entry != names.FINALIZER]
        meta: dict[str, Any] = {
            "uid": snapshot.uid,
            "resourceVersion": snapshot.resource_version,
            "finalizers": [*others, names.FINALIZER] if add else others,
        }
        try:
            body = await self._client.patch(names.PLURAL, namespace, name, {"metadata": meta})
        except NotFound:
            self._cache.drop_body(snapshot.body)
            return
        except Conflict as error:
            try:
                self._cache.put_body(await self._client.get(names.PLURAL, namespace, name))
            except NotFound:
                self._cache.drop_body(snapshot.body)
            raise OutOfDate from error
        if "deletionTimestamp" in body["metadata"] and not meta["finalizers"]:
            self._cache.drop_body(snapshot.body)  # it is gone, and the answer has no newer version
        else:
            self._cache.put_body(body)
        log.info("finalizer %s", "added" if add else "removed", extra={"namespace": namespace, "job": name})


def finalizers(snapshot: JobSnapshot) -> tuple[str, ...]:
    """Returns the finalizers of a job."""
    return tuple(snapshot.body["metadata"].get("finalizers") or ())


def has_finalizer(snapshot: JobSnapshot) -> bool:
    """Whether a job has the finalizer of this operator."""
    return names.FINALIZER in finalizers(snapshot)
