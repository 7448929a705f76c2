"""Lists who else could own the destination of a job. It only reads the cache."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from finetune_api.messages.rivals import Rivals, digest_of
from finetune_api.resource import FineTuneJob
from finetune_operator.controller.cache import Cache
from finetune_operator.core.status import timestamp

MAX_RIVALS = 500  # of 32 bytes each, in an annotation of the pods


def rivals(cache: Cache, job: FineTuneJob, namespaces: tuple[str, ...], now: datetime) -> Rivals | None:
    """Returns the rivals of a job at the time `now`; None if they are too many to be listed.

    `namespaces` are those that are watched, or all if empty. Of claims on a volume, only those of
    the job's own namespace may be replaced: elsewhere, another claim may be the same volume.
    """
    namespace = job.metadata.namespace
    if _is_volume(job.spec.output.uri):
        namespaces = (namespace,)
    uids = {*_of_the_same_output(cache, job), *_with_live_pods(cache, namespaces)} - {job.metadata.uid, ""}
    if len(uids) > MAX_RIVALS:
        return None
    return Rivals(as_of=timestamp(now), digests=tuple(sorted(map(digest_of, uids))), namespaces=namespaces)


def _of_the_same_output(cache: Cache, job: FineTuneJob) -> Iterator[str]:
    """Yields the uids of jobs that name the same folder or, as this one does, a folder of a volume:
    two claims of a namespace may be the same volume."""
    place = _place(job.metadata.namespace, job.spec.output.uri)
    for body in cache.bodies():
        uri = str(((body.get("spec") or {}).get("output") or {}).get("uri", ""))
        if _place(str(body["metadata"]["namespace"]), uri) == place:
            yield str(body["metadata"]["uid"])


def _with_live_pods(cache: Cache, namespaces: tuple[str, ...]) -> Iterator[str]:
    """Yields the uids of deleted jobs whose pods may still store a last checkpoint."""
    existing = {str(body["metadata"]["uid"]) for body in cache.bodies()}
    for pod in cache.pods():
        if pod.is_live and pod.owner_uid not in existing and (not namespaces or pod.namespace in namespaces):
            yield pod.owner_uid


def _place(namespace: str, uri: str) -> tuple[str, str]:
    """Returns what is equal for two outputs that may be the same folder."""
    return (namespace, "") if _is_volume(uri) else ("", uri.rstrip("/"))


def _is_volume(uri: str) -> bool:
    return uri.startswith(("pvc://", "volume://"))
