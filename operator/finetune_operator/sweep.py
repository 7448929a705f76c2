"""sweep: lists everything, at the start and every few minutes, and compares it with the cache.

Watches lose deletions (after a 410) and may fall silent; what they missed is found here. Called by the door; changes
nothing in the cluster.
"""

from __future__ import annotations

import asyncio
import logging

from finetune_api import names
from finetune_operator.cache import Cache, Key
from finetune_operator.cluster import Cluster, Unavailable
from finetune_operator.queue import Queue

log = logging.getLogger(__name__)


async def sweep(cluster: Cluster, cache: Cache, queue: Queue, namespaces: tuple[str, ...]) -> None:
    """One list of each kind. Raises cluster.Unavailable."""
    before = cache.uids()
    concerned: set[Key] = set()
    for kind, put in ((names.PLURAL, cache.put_body), ("jobs", cache.put_job), ("pods", cache.put_pod)):
        items = await cluster.all_of(kind, namespaces)
        concerned |= {key for key in map(put, items) if key}
        missing = before[kind] - {item["metadata"]["uid"] for item in items}
        if missing:
            log.info("the sweep found %d %s gone", len(missing), kind)
        concerned |= cache.drop_missing(kind, missing)
    for key in concerned:
        queue.add(key)


async def sweep_for_ever(
    cluster: Cluster, cache: Cache, queue: Queue, namespaces: tuple[str, ...], seconds: float
) -> None:
    """Every so often; a sweep that the API server refuses is made up for by the next one."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await sweep(cluster, cache, queue, namespaces)
        except Unavailable as error:
            log.warning("no sweep: %s", error)
