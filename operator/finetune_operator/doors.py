"""doors: kopf's watches feed the cache and the queue. Low-level handlers only, which write nothing to any object.

Called by the door of the process. Decides nothing; a surprise in here ends the process instead of being logged away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kopf

from finetune_api import names
from finetune_operator.cache import Cache, Key
from finetune_operator.queue import Queue

Raw = Mapping[str, Any]
Die = Callable[[BaseException], None]
Touch = Callable[[], None]

_CHILDREN = {"app.kubernetes.io/managed-by": names.COMMON_LABELS["app.kubernetes.io/managed-by"]}
_SELECTOR = ",".join(f"{key}={value}" for key, value in _CHILDREN.items())
_BACKOFFS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)


class _NoDiffBase(kopf.DiffBaseStorage):
    """kopf copies every object to see what changes; nobody here asks, and the copies are most of its work."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        """Nothing is ever stored."""


class _NoProgress(kopf.ProgressStorage):
    """Low-level handlers have no progress."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        """Nothing is ever stored."""

    def purge(self, **_: Any) -> None:
        """Nothing was stored."""

    def touch(self, **_: Any) -> None:
        """Nothing is ever touched."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def settings() -> kopf.OperatorSettings:
    """No peering, no scanning, no posting: kopf watches, and that is all."""
    chosen = kopf.OperatorSettings()
    chosen.peering.standalone = True
    chosen.scanning.disabled = True
    chosen.posting.enabled = False
    chosen.persistence.finalizer = f"{names.GROUP}/kopf"
    chosen.persistence.diffbase_storage = _NoDiffBase()
    chosen.persistence.progress_storage = _NoProgress()
    chosen.queueing.idle_timeout = 1.0
    chosen.watching.chunk_size = 500
    chosen.watching.server_timeout = 300
    chosen.watching.connect_timeout = 10
    chosen.watching.label_selectors[("batch", "v1", "jobs")] = _SELECTOR
    chosen.watching.label_selectors[("", "v1", "pods")] = _SELECTOR
    chosen.networking.request_timeout = 60
    chosen.networking.error_backoffs = _BACKOFFS
    chosen.process.ultimate_exiting_timeout = 20
    return chosen


def registry(cache: Cache, queue: Queue, die: Die, kubeconfig: Path | None) -> kopf.OperatorRegistry:
    """The three doors, and how to log in."""
    doors = kopf.OperatorRegistry()

    def enqueue(key: Key | None) -> None:
        if key is not None:
            queue.add(key)

    @kopf.on.login(registry=doors)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        account = None if kubeconfig else kopf.login_with_service_account(**kwargs)
        return account or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=doors)
    async def finetunejob(event: Raw, **_: Any) -> None:
        enqueue(_taken(die, _gone(event), cache.drop_body, cache.put_body, event["object"]))

    @kopf.on.event("batch", "v1", "jobs", labels=_CHILDREN, registry=doors)
    async def child_job(event: Raw, **_: Any) -> None:
        enqueue(_taken(die, _gone(event), lambda raw: cache.drop_job(_uid(raw)), cache.put_job, event["object"]))

    @kopf.on.event("", "v1", "pods", labels=_CHILDREN, registry=doors)
    async def pod(event: Raw, **_: Any) -> None:
        enqueue(_taken(die, _gone(event), lambda raw: cache.drop_pod(_uid(raw), raw), cache.put_pod, event["object"]))

    return doors


def _taken(
    die: Die, gone: bool, drop: Callable[[Raw], Key | None], put: Callable[[Raw], Key | None], body: Raw
) -> Key | None:
    try:
        return drop(body) if gone else put(body)
    except Exception as surprise:
        die(surprise)
        raise


def _gone(event: Raw) -> bool:
    return bool(event["type"] == "DELETED")


def _uid(raw: Raw) -> str:
    return str(raw["metadata"]["uid"])
