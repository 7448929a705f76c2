"""Registers kopf's watches, which feed the cache and the queue.

Only low-level handlers are used, which write nothing to any object. They decide nothing. An object
that can't be read is left out; a broken invariant ends the process, while kopf would only log it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kopf

from finetune_api import names
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.resync import tolerantly
from finetune_operator.controller.snapshot import Key
from finetune_operator.controller.workqueue import WorkQueue

Raw = Mapping[str, Any]
Abort = Callable[[BaseException], None]
"""Is called with an unexpected error and ends the process."""

_CHILD_SELECTOR = ",".join(f"{key}={value}" for key, value in names.WATCHED_LABELS.items())
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)


class _NoDiffBase(kopf.DiffBaseStorage):
    """Keeps kopf from copying every object to compute diffs.

    The diffs aren't used here, and the copies are most of kopf's work.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        """Returns nothing to compare."""
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        """Returns None, since nothing is ever stored."""

    def store(self, **_: Any) -> None:
        """Stores nothing."""


class _NoProgress(kopf.ProgressStorage):
    """Stores no progress of handlers: low-level ones have none."""

    def fetch(self, **_: Any) -> None:
        """Returns None, since nothing is ever stored."""

    def store(self, **_: Any) -> None:
        """Stores nothing."""

    def purge(self, **_: Any) -> None:
        """Removes nothing, since nothing is ever stored."""

    def touch(self, **_: Any) -> None:
        """Changes nothing."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """Returns the essence unchanged, since it contains no progress."""
        return essence


def kopf_settings() -> kopf.OperatorSettings:
    """Returns settings by which kopf only watches; it neither peers, scans nor posts events."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.persistence.finalizer = f"{names.GROUP}/kopf"
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.persistence.progress_storage = _NoProgress()
    settings.queueing.idle_timeout = 1.0
    settings.watching.chunk_size = 500
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 10
    settings.watching.label_selectors[("batch", "v1", "jobs")] = _CHILD_SELECTOR
    settings.watching.label_selectors[("", "v1", "pods")] = _CHILD_SELECTOR
    settings.networking.request_timeout = 60
    settings.networking.error_backoffs = _BACKOFF_SECONDS
    settings.process.ultimate_exiting_timeout = 20
    return settings


def registry(cache: Cache, queue: WorkQueue, abort: Abort, kubeconfig: Path | None) -> kopf.OperatorRegistry:
    """Returns the handlers of the three watches and of the login.

    Without a kubeconfig, the login uses the pod's service account if there is one.
    """
    handlers = kopf.OperatorRegistry()

    def enqueue(key: Key | None) -> None:
        if key is not None:
            queue.add(key)

    @kopf.on.login(registry=handlers)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        account = None if kubeconfig else kopf.login_with_service_account(**kwargs)
        return account or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=handlers)
    async def finetunejob(event: Raw, **_: Any) -> None:
        enqueue(_update(abort, event, cache.drop_body, cache.put_body))

    @kopf.on.event("batch", "v1", "jobs", labels=names.WATCHED_LABELS, registry=handlers)
    async def child_job(event: Raw, **_: Any) -> None:
        enqueue(_update(abort, event, lambda raw: cache.drop_job(_uid(raw), raw), cache.put_job))

    @kopf.on.event("", "v1", "pods", labels=names.WATCHED_LABELS, registry=handlers)
    async def pod(event: Raw, **_: Any) -> None:
        enqueue(_update(abort, event, lambda raw: cache.drop_pod(_uid(raw), raw), cache.put_pod))

    return handlers


def _update(
    abort: Abort, event: Raw, drop: Callable[[Raw], Key | None], put: Callable[[Raw], Key | None]
) -> Key | None:
    """Updates the cache. Returns the key of the FineTuneJob to reconcile; None if unknown."""
    try:
        return tolerantly(drop if event["type"] == "DELETED" else put, event["object"])
    except Exception as error:
        abort(error)
        raise


def _uid(raw: Raw) -> str:
    return str(raw["metadata"]["uid"])
