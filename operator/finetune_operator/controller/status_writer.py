"""Writes a job's status, and a reduced one while the API server refuses it."""

from __future__ import annotations

import logging
import time
from typing import Any

from finetune_api.status import Status, read
from finetune_operator.controller.snapshot import JobSnapshot, Key
from finetune_operator.controller.workqueue import WorkQueue
from finetune_operator.core import reduced_status
from finetune_operator.kube.client import KubeClient, Refused

log = logging.getLogger(__name__)

_REFUSED_SECONDS = 60.0  # until a status that the API server refuses is tried again


class StatusWriter:
    """Remembers which statuses were refused, so that they aren't tried again too soon."""

    def __init__(self, client: KubeClient, queue: WorkQueue) -> None:
        self._client = client
        self._queue = queue
        self._refused_until: dict[Key, float] = {}  # when a refused status is tried again (monotonic)
        self._refusals: dict[Key, str] = {}

    async def apply(self, snapshot: JobSnapshot, after: Status) -> dict[str, Any] | None:
        """Applies a status to the version of the object that the snapshot has.

        Returns the object; None if even the reduced status is refused. It is tried again later.
        Raises Conflict if the version has changed, and NotFound if the object is gone.
        """
        key, version = snapshot.key, snapshot.resource_version
        if time.monotonic() >= self._refused_until.get(key, 0.0):
            try:
                body = await self._client.apply_status(*key, version, after.to_json())
            except Refused as error:
                self._refused_until[key] = time.monotonic() + _REFUSED_SECONDS
                self._refusals[key] = f"{error.code} {error.reason or error.message[:200]}"
                log.warning("status refused: %s", error, extra={"namespace": key[0], "job": key[1]})
            else:
                self._refused_until.pop(key, None)
                return body
        self._queue.add_after(key, _REFUSED_SECONDS)
        less = reduced_status.refused(after, self._refusals[key])
        if less == read(snapshot.body.get("status")):
            return None
        try:
            return await self._client.apply_status(*key, version, less.to_json())
        except Refused as error:
            log.error("even a reduced status is refused: %s", error, extra={"namespace": key[0], "job": key[1]})
            return None

    def forget(self, key: Key) -> None:
        """Removes all that is in memory about a job."""
        self._refused_until.pop(key, None)
        self._refusals.pop(key, None)
