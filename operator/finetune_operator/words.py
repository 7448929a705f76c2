"""words: what the kubelet and the controllers said of pods and Jobs that are stuck, out of the cluster's events.

Called by reconcile for the few objects whose own status doesn't say what they wait for (a missing Secret, a claim that
doesn't mount, a quota). Reads only, and only while something is stuck.
"""

from __future__ import annotations

import logging
from typing import Any

from finetune_operator.cluster import Cluster, Refused

log = logging.getLogger(__name__)

_LONGEST_WORDS = 600


class Words:
    """The last warning about each stuck object, by uid."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._said: dict[str, str] = {}

    @property
    def said(self) -> dict[str, str]:
        return self._said

    async def ask(self, namespace: str, uids: tuple[str, ...]) -> bool:
        """Whether anything new was said of these objects."""
        news = False
        for uid in uids:
            fields = f"involvedObject.uid={uid},type=Warning"
            try:
                events = [event async for event in self._cluster.items("events", namespace, fields=fields)]
            except Refused as error:
                log.warning("can't read events, so status can't say what pods wait for: %s", error)
                return news
            if not events:
                continue
            newest = max(events, key=_time)
            said = f"{newest.get('reason', '')}: {newest.get('message', '')}".strip(": ")[:_LONGEST_WORDS]
            news = news or self._said.get(uid) != said
            self._said[uid] = said
        return news

    def forget(self, uids: tuple[str, ...]) -> None:
        """Nobody waits for these any more."""
        for uid in uids:
            self._said.pop(uid, None)


def _time(event: dict[str, Any]) -> str:
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp", "")
    )
