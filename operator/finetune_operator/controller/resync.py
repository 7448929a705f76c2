"""Lists all objects at the start and every few minutes, and compares them with the cache.

Watches lose deletions (after a 410) and may fall silent; a resync detects what they have missed. It
changes nothing in the cluster.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from finetune_api import names
from finetune_operator.controller.cache import Key
from finetune_operator.controller.state import ControllerState
from finetune_operator.kube.client import KubeClient, Unavailable

log = logging.getLogger(__name__)


async def resync(
    client: KubeClient, state: ControllerState, namespaces: tuple[str, ...], completed: Callable[[], None]
) -> None:
    """Lists each resource once, queues every affected job, and calls `completed`.

    Empty `namespaces` mean all. Raises kube.client.Unavailable.
    """
    cache = state.cache
    cache.forget_deletions()
    before = cache.uids()
    affected: set[Key] = set()
    for kind, put in ((names.PLURAL, cache.put_body), ("jobs", cache.put_job), ("pods", cache.put_pod)):
        items = await client.all_of(kind, namespaces)
        affected |= {key for key in map(put, items) if key}
        missing = before[kind] - {item["metadata"]["uid"] for item in items}
        if missing:
            log.info("resync removed %d %s that no longer exist", len(missing), kind)
        affected |= cache.drop_missing(kind, missing)
    for key in affected:
        state.queue.add(key)
    completed()


async def resync_periodically(
    client: KubeClient,
    state: ControllerState,
    namespaces: tuple[str, ...],
    completed: Callable[[], None],
    seconds: float,
) -> None:
    """Resyncs every `seconds`, forever; a failed resync is logged, and the next one repeats it."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await resync(client, state, namespaces, completed)
        except Unavailable as error:
            log.warning("resync failed: %s", error)
