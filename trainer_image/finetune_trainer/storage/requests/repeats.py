"""Repeats a request that the client of an object store has given up too early.

The client repeats what a server refuses for now. It doesn't repeat every request whose connection
is lost, because such a request may have had its effect. All of ours may have it twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from finetune_trainer.storage.requests.redirects import is_redirect

_TRANSPORT = re.compile(r"HTTP error: (?!builder)")
_OWN_RETRIES = re.compile(r"after (\d+) retries")
_LONGEST_WAIT = 10.0
T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Limits how often, and for how many seconds, one request is retried before it fails."""

    retries: int = 6
    seconds: float = 60.0
    first_wait: float = 0.2
    request_seconds: float = 120.0


def repeated(action: Callable[[], T], policy: RetryPolicy, sleep: Callable[[float], None] = time.sleep) -> T:
    """Returns the result of `action`, which is repeated if its connection is lost.

    The retries of the client itself count, too.
    """
    tries, started = 0, time.monotonic()
    while True:
        try:
            return action()
        except Exception as error:
            if not _TRANSPORT.search(str(error)) or is_redirect(error):
                raise
            tries += 1 + _retries_of_client(error)
            wait = min(policy.first_wait * 2 ** (tries - 1), _LONGEST_WAIT)
            if tries > policy.retries or time.monotonic() - started + wait > policy.seconds:
                raise
        sleep(wait)


def _retries_of_client(error: Exception) -> int:
    match = _OWN_RETRIES.search(str(error))
    return int(match[1]) if match else 0
