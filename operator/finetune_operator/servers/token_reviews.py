"""Finds out which pod a bearer token is bound to, by reviews that the API server does.

A review costs the API server something, and anybody can post tokens. So a token is reviewed only if
its own claims say that it is ours, in date, and of a pod that may post; reviews have a budget of
their own; and each result, bad ones too, is remembered for a while.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from finetune_api import names
from finetune_operator.kube.client import ApiError
from finetune_operator.kube.rate_limiter import RateLimiter

MAX_TOKEN_CHARACTERS = 6144
MAX_RESULTS = 10000  # that are remembered; a full table is cleared

_VALID_SECONDS = 60.0
_REVIEWS_PER_SECOND = 10.0
_BURST_REVIEWS = 20
_MAX_WAITING = 20
_MAX_WAITING_PER_ADDRESS = 4

Review = Callable[[str, str], Awaitable[dict[str, Any]]]
"""Has the API server review a token for an audience. Returns the status of the TokenReview."""


@dataclass(frozen=True)
class Caller:
    """Identifies the pod that a valid token is bound to."""

    namespace: str
    pod_uid: str


class Busy(Exception):
    """Is raised if too many reviews are waiting."""


class TokenReviews:
    """Reviews tokens and remembers the results for a minute."""

    def __init__(self, review: Review) -> None:
        self._review = review
        self._limiter = RateLimiter(_REVIEWS_PER_SECOND, _BURST_REVIEWS)
        self._waiting: Counter[str] = Counter()  # by address
        self._results: dict[str, tuple[Caller | None, float]] = {}  # by digest of the token

    async def caller(self, token: str, address: str) -> Caller | None:
        """Returns the pod that a token is bound to; None if it isn't valid.

        Raises Busy, or kube.client.ApiError.
        """
        digest = hashlib.sha256(token.encode()).hexdigest()
        result = self._results.get(digest)
        if result is None or time.monotonic() - result[1] > _VALID_SECONDS:
            result = (await self._reviewed(token, address), time.monotonic())
            if len(self._results) >= MAX_RESULTS:
                self._results.clear()
            self._results[digest] = result
        return result[0]

    async def _reviewed(self, token: str, address: str) -> Caller | None:
        if self._waiting.total() >= _MAX_WAITING or self._waiting[address] >= _MAX_WAITING_PER_ADDRESS:
            raise Busy
        self._waiting[address] += 1
        try:
            await self._limiter.acquire()
            status = await self._review(token, names.PROGRESS_AUDIENCE)
        except ApiError as error:
            if error.code == 400:
                return None
            raise
        finally:
            self._waiting[address] -= 1
            if self._waiting[address] <= 0:
                del self._waiting[address]
        return _caller(status)


def claimed(token: str, now: float) -> Caller | None:
    """Returns the pod that a token claims to be bound to, unverified.

    None if it isn't a token of a service account, bound to a pod, for our audience and in date:
    reviewing such a token would be pointless. `now` is in seconds since 1970.
    """
    if len(token) > MAX_TOKEN_CHARACTERS or not token.isascii() or token.count(".") != 2:
        return None
    payload = token.split(".")[1]
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, RecursionError):
        return None
    return _claimed(claims, now) if isinstance(claims, dict) else None


def _claimed(claims: dict[str, Any], now: float) -> Caller | None:
    audiences, expires = claims.get("aud"), claims.get("exp")
    bound = claims.get("kubernetes.io")
    pod = bound.get("pod") if isinstance(bound, dict) else None
    if not isinstance(pod, dict) or not isinstance(bound, dict):
        return None
    namespace, uid = bound.get("namespace"), pod.get("uid")
    ours = names.PROGRESS_AUDIENCE in (audiences if isinstance(audiences, list) else [audiences])
    in_date = isinstance(expires, int | float) and expires > now
    return Caller(namespace, uid) if ours and in_date and isinstance(namespace, str) and isinstance(uid, str) else None


def _caller(status: dict[str, Any]) -> Caller | None:
    """Returns the pod that a reviewed token is bound to; None if it is invalid or bound to none."""
    if not status.get("authenticated") or names.PROGRESS_AUDIENCE not in (status.get("audiences") or ()):
        return None
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    pod_uid = (extra.get("authentication.kubernetes.io/pod-uid") or [""])[0]
    parts = str(user.get("username", "")).split(":")
    if not pod_uid or parts[:2] != ["system", "serviceaccount"] or len(parts) != 4:
        return None
    return Caller(namespace=parts[2], pod_uid=pod_uid)
