"""Reads the cluster's warning events about pods and Jobs that are stuck.

They explain what an object is waiting for if its own status doesn't: a missing Secret, a claim that
can't be mounted, a quota. Events are read only while something is stuck; nothing is ever written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from finetune_operator.kube.client import KubeClient, Refused

log = logging.getLogger(__name__)

_MAX_MESSAGE_CHARACTERS = 600


class WarningEvents:
    """Keeps the last warning about each stuck object, as "reason: message", by its uid."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._messages: dict[str, str] = {}

    @property
    def messages(self) -> Mapping[str, str]:
        """The last warning about each stuck object, by its uid."""
        return self._messages

    async def refresh(self, namespace: str, uids: tuple[str, ...]) -> bool:
        """Reads the events about these objects again. Returns whether any warning has changed."""
        changed = False
        for uid in uids:
            fields = f"involvedObject.uid={uid},type=Warning"
            try:
                events = [event async for event in self._client.items("events", namespace, fields=fields)]
            except Refused as error:
                log.warning("events can't be read, so status can't explain what pods are waiting for: %s", error)
                return changed
            if not events:
                continue
            newest = max(events, key=_time)
            message = f"{newest.get('reason', '')}: {newest.get('message', '')}".strip(": ")[:_MAX_MESSAGE_CHARACTERS]
            changed = changed or self._messages.get(uid) != message
            self._messages[uid] = message
        return changed

    def forget(self, uids: tuple[str, ...]) -> None:
        """Removes the warnings about objects that are gone."""
        for uid in uids:
            self._messages.pop(uid, None)


def _time(event: dict[str, Any]) -> str:
    """Returns when an event last occurred (RFC 3339), from the first of its fields that is set."""
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp", "")
    )
