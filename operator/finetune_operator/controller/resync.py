"""Lists all objects at the start and every few minutes, and compares them with the cache.

Watches lose deletions (after a 410) and may fall silent; a resync detects what they have missed. It
changes nothing in the cluster.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from finetune_api import names
from finetune_operator.controller.snapshot import Key, Raw
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.workqueue import BrokenInvariant
from finetune_operator.kube.client import ApiError, KubeClient, NotFound

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 10.0
# Watches begin after the first resync, and never report what was deleted in between.
_SECONDS_AFTER_START = (2.0, 8.0)


def tolerantly(update: Callable[[Raw], Key | None], raw: Raw) -> Key | None:
    """Updates the cache with one object; one that can't be read costs a log line and no more.

    Returns the key of the FineTuneJob that it belongs to; None if there is none.
    """
    try:
        return update(raw)
    except BrokenInvariant:
        raise
    except Exception:
        meta = raw.get("metadata") or {}
        log.exception("object ignored: namespace=%s name=%s", meta.get("namespace"), meta.get("name"))
        return None


async def first_resync(
    client: KubeClient, state: ControllerState, namespaces: tuple[str, ...], completed: Callable[[], None]
) -> None:
    """Resyncs once, with retries while the API server is overloaded or lists expire."""
    delay = _FIRST_RETRY_SECONDS
    while True:
        try:
            return await resync(client, state, namespaces, completed)
        except NotFound:
            raise
        except ApiError as error:
            log.warning("the first resync failed, retrying in %.1f s: %s", delay, error)
        await asyncio.sleep(delay)
        delay = min(2 * delay, _LONGEST_RETRY_SECONDS)


async def resync(
    client: KubeClient,
    state: ControllerState,
    namespaces: tuple[str, ...],
    completed: Callable[[], None],
    *,
    forget: bool = True,
) -> None:
    """Lists each resource once, queues every affected job, and calls `completed`.

    Empty `namespaces` mean all. With `forget`, deletions before the last resync are forgotten.
    Raises kube.client.ApiError.
    """
    cache = state.cache
    if forget:
        cache.forget_deletions()
    before = cache.uids()
    affected: set[Key] = set()
    for kind, put in ((names.PLURAL, cache.put_body), ("jobs", cache.put_job), ("pods", cache.put_pod)):
        listed: set[str] = set()
        async for item in client.all_of(kind, namespaces):
            listed.add(item["metadata"]["uid"])
            if key := tolerantly(put, item):
                affected.add(key)
        missing = before[kind] - listed
        if missing:
            log.info("resync removed %d %s that no longer exist", len(missing), kind)
        affected |= cache.drop_missing(kind, missing)
    for changed in affected:
        state.queue.add(changed)
    completed()


async def resync_periodically(
    client: KubeClient,
    state: ControllerState,
    namespaces: tuple[str, ...],
    completed: Callable[[], None],
    seconds: float,
) -> None:
    """Resyncs twice soon after the start, and then every `seconds`, forever.

    A failed resync is logged, and the next one repeats it.
    """
    for number in itertools.count():
        early = number < len(_SECONDS_AFTER_START)
        await asyncio.sleep(min(_SECONDS_AFTER_START[number], seconds) if early else seconds)
        try:
            await resync(client, state, namespaces, completed, forget=not early)
        except ApiError as error:
            log.warning("resync failed: %s", error)
