"""Reads the cluster's warning events about pods and Jobs that are stuck.

They explain what an object is waiting for if its own status doesn't: a missing Secret, a claim that
can't be mounted, a quota. Events are read only while something is stuck, and for a namespace as a
whole: the API server decodes all of a namespace's events for any list of them, so that one list for
each object would make a thousand stuck jobs cost a million events. Nothing is ever written.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from finetune_operator.kube.client import KubeClient, Refused

log = logging.getLogger(__name__)

_MAX_MESSAGE_CHARACTERS = 600
_MAX_UID_CHARACTERS = 64  # anybody who may create Events can put anything into them
_MAX_OBJECTS = 5000  # of one namespace, whose warnings are kept
_SHORTEST_INTERVAL_SECONDS = 2.0  # between two lists of a namespace
_LONGEST_INTERVAL_SECONDS = 30.0
_DUTY = 0.05  # share of the time that lists of one namespace may take


class WarningEvents:
    """Keeps the last warning about each stuck object, as "reason: message", by its uid."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._messages: dict[str, str] = {}  # about objects that were asked for
        self._listed: dict[str, dict[str, str]] = defaultdict(dict)  # by namespace: its newest list
        self._next_list: dict[str, float] = {}  # by namespace (monotonic)

    @property
    def messages(self) -> Mapping[str, str]:
        """The last warning about each stuck object, by its uid."""
        return self._messages

    async def refresh(self, namespace: str, uids: tuple[str, ...]) -> bool:
        """Reads the warnings about these objects, unless the namespace was read a moment ago.

        Returns whether any warning has changed.
        """
        now = time.monotonic()
        if now >= self._next_list.get(namespace, 0.0):
            # Others that ask while the list is under way use the one before.
            self._next_list[namespace] = now + _LONGEST_INTERVAL_SECONDS
            await self._list(namespace)
            duration = time.monotonic() - now
            pause = min(max(duration / _DUTY, _SHORTEST_INTERVAL_SECONDS), _LONGEST_INTERVAL_SECONDS)
            self._next_list[namespace] = now + duration + pause
        changed = False
        for uid in uids:
            message = self._listed[namespace].get(uid)
            if message is not None and self._messages.get(uid) != message:
                self._messages[uid] = message
                changed = True
        return changed

    def forget(self, uids: tuple[str, ...]) -> None:
        """Removes the warnings about objects that are gone."""
        for uid in uids:
            self._messages.pop(uid, None)

    async def _list(self, namespace: str) -> None:
        newest: dict[str, tuple[str, str]] = {}
        try:
            async for event in self._client.items("events", namespace, fields="type=Warning"):
                uid = str((event.get("involvedObject") or {}).get("uid", ""))
                if len(uid) > _MAX_UID_CHARACTERS or (uid not in newest and len(newest) >= _MAX_OBJECTS):
                    continue
                message = f"{event.get('reason', '')}: {event.get('message', '')}".strip(": ")
                newest[uid] = max(newest.get(uid, ("", "")), (_time(event), message[:_MAX_MESSAGE_CHARACTERS]))
        except Refused as error:
            log.warning("events can't be read, so status can't explain what pods are waiting for: %s", error)
            return
        self._listed[namespace] = {uid: message for uid, (_, message) in newest.items() if uid}


def _time(event: dict[str, Any]) -> str:
    """Returns when an event last occurred (RFC 3339), from the first of its fields that is set."""
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp", "")
    )
