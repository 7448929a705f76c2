"""Tells the time as the API server has it.

Nodes, controllers and the API server write times into objects, and the operator compares them with
now: when a pod is overdue, how long an attempt has lived, when the next one starts. A clock that is
wrong by minutes, as on a node without NTP, would make it wait for minutes or take pods for lost
that are only stopping. Each answer of the API server has its time, in whole seconds.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

log = logging.getLogger(__name__)

_REPORTED_SECONDS = 5.0  # a difference below that isn't worth a line in the log


class ServerClock:
    """Follows the difference between this machine's clock and the API server's."""

    def __init__(self) -> None:
        self._offset = 0.0  # seconds by which the server's clock is ahead
        self._reported = 0.0

    def now(self) -> datetime:
        """Returns the time of the API server, as far as its answers say."""
        return datetime.now(UTC) + timedelta(seconds=self._offset)

    def observe(self, date: str | None, sent: float, received: float) -> None:
        """Receives the header Date of an answer, and when the request was sent and answered, by
        this machine's clock in seconds since 1970.

        The answer was written in between, and its time is cut to seconds, so that it only bounds
        the difference; one within these bounds stays as it is.
        """
        try:
            moment = parsedate_to_datetime(date) if date else None
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            return
        low, high = moment.timestamp() - received, moment.timestamp() + 1 - sent
        self._offset = min(max(self._offset, low), high) if low <= high else self._offset
        if abs(self._offset - self._reported) > _REPORTED_SECONDS:
            self._reported = self._offset
            log.warning("this machine's clock differs from the API server's: seconds=%.0f", self._offset)
