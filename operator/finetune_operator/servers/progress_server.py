"""Receives the progress posts of trainer pods.

A bearer token identifies the pod (TokenReview; the kubelet binds the token to it), and the cache
identifies the pod's job, so a pod can only report for its own job. Losing a post, or this server,
never disturbs training.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from finetune_api import names
from finetune_api.messages.progress import MAX_BODY_BYTES, Progress
from finetune_operator.controller.snapshot import Key
from finetune_operator.controller.state import ControllerState
from finetune_operator.core.status import timestamp
from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.kube.leader_election import Leadership
from finetune_operator.settings import ProgressSettings

_REVIEW_SECONDS = 60.0  # how long the review of a token stays valid
_MAX_ENTRIES = 10000  # of each table; a full one is cleared
_POSTS_PER_SECOND = 2.0
_BURST_POSTS = 10.0


@dataclass(frozen=True)
class Caller:
    """Identifies the pod that a valid token is bound to."""

    namespace: str
    pod_uid: str


@dataclass
class _TokenBucket:
    """Limits the posts of one pod: how many it may send now, and when that was computed."""

    posts: float
    refilled_at: float


class Refusal(Exception):
    """Is raised to reject a post with a status code and a message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ProgressServer:
    """Accepts posts while this replica leads, else redirects them to the leader."""

    def __init__(
        self,
        client: KubeClient,
        state: ControllerState,
        leadership: Leadership,
        settings: ProgressSettings,
        count: Callable[[int], None],
    ) -> None:
        self._client = client
        self._cache = state.cache
        self._queue = state.queue
        self._progress = state.progress
        self._leadership = leadership
        self._settings = settings
        self._count = count
        self._reviews: dict[str, tuple[Caller | None, float]] = {}
        self._buckets: dict[str, _TokenBucket] = {}  # by uid of the pod
        self._enqueued_at: dict[str, float] = {}  # by uid of the FineTuneJob

    def app(self) -> web.Application:
        """Returns the app that serves `POST /v1/progress`."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post(names.PROGRESS_PATH, self._post)
        return app

    async def _post(self, request: web.Request) -> web.Response:
        try:
            await self._receive(request)
        except Refusal as refusal:
            self._count(refusal.code)
            return web.json_response({"message": refusal.message}, status=refusal.code)
        except web.HTTPException as response:
            self._count(response.status)
            raise
        self._count(200)
        return web.json_response({})

    async def _receive(self, request: web.Request) -> None:
        """Stores the progress of a post. Raises Refusal or a redirect to the leader."""
        if not self._leadership.is_leader:
            self._redirect_to_leader()
        caller = await self._caller(request.headers.get("Authorization", ""))
        self._limit_rate(caller.pod_uid)
        key, attempt, uid = self._job_of(caller)
        progress = _parse(await request.read())
        if progress.attempt != attempt:
            raise Refusal(
                403, f"the pod belongs to attempt {attempt}, but reports progress of attempt {progress.attempt}"
            )
        new_phase = self._progress.put(uid, progress, timestamp(datetime.now(UTC)))
        self._enqueue(key, uid, new_phase)

    def _redirect_to_leader(self) -> None:
        holder = self._leadership.holder
        if holder is None:
            raise Refusal(503, "no replica is the leader at the moment; post again later")
        host = f"[{holder.pod_ip}]" if ":" in holder.pod_ip else holder.pod_ip
        raise web.HTTPTemporaryRedirect(f"http://{host}:{self._settings.port}{names.PROGRESS_PATH}")

    async def _caller(self, authorization: str) -> Caller:
        """Returns the pod that a bearer token identifies. Raises Refusal if it isn't valid."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "a bearer token is required")
        digest = hashlib.sha256(token.encode()).hexdigest()
        review = self._reviews.get(digest)
        if review is None or time.monotonic() - review[1] > _REVIEW_SECONDS:
            review = (await self._review(token), time.monotonic())
            _clear_if_full(self._reviews)
            self._reviews[digest] = review
        caller, _ = review
        if caller is None:
            raise Refusal(401, f"the token isn't valid for audience {names.PROGRESS_AUDIENCE}")
        return caller

    async def _review(self, token: str) -> Caller | None:
        try:
            status = await self._client.review_token(token, names.PROGRESS_AUDIENCE)
        except ApiError as error:
            raise Refusal(
                503, f"the token can't be reviewed at the moment: {error.reason}; post again later"
            ) from error
        return _caller(status)

    def _limit_rate(self, pod_uid: str) -> None:
        """Counts a post of a pod. Raises Refusal if it posts much faster than configured."""
        now = time.monotonic()
        _clear_if_full(self._buckets)
        bucket = self._buckets.get(pod_uid) or _TokenBucket(_BURST_POSTS, now)
        posts = min(_BURST_POSTS, bucket.posts + (now - bucket.refilled_at) * _POSTS_PER_SECOND)
        self._buckets[pod_uid] = _TokenBucket(max(posts - 1.0, -1.0), now)
        if posts < 1.0:
            raise Refusal(429, "too many posts; post less often")

    def _job_of(self, caller: Caller) -> tuple[Key, int, str]:
        """Returns key, attempt and uid of the caller's FineTuneJob.

        Raises Refusal if the pod doesn't belong to the current attempt of one.
        """
        pod = self._cache.pod(caller.pod_uid)
        owner = self._cache.owner_of(pod) if pod and pod.namespace == caller.namespace else None
        if owner is None or owner[1].role != names.ROLE_TRAINER:
            raise Refusal(403, "the token's pod isn't a trainer pod of a FineTuneJob")
        key, job = owner
        snapshot = self._cache.snapshot(key)
        if snapshot is None or not snapshot.attempts or snapshot.attempts[-1].job.uid != job.uid:
            raise Refusal(403, f"the token's pod belongs to attempt {job.attempt}, which isn't the current one")
        return key, job.attempt, job.owner_uid

    def _enqueue(self, key: Key, uid: str, new_phase: bool) -> None:
        """Queues the job if its status may be due: immediately for a new phase."""
        now = time.monotonic()
        if new_phase or now - self._enqueued_at.get(uid, 0.0) >= self._settings.write_every_seconds:
            _clear_if_full(self._enqueued_at)
            self._enqueued_at[uid] = now
            self._queue.add(key)


def _clear_if_full(table: dict[str, Any]) -> None:
    """Bounds the memory of a table, whose entries are computed again when needed."""
    if len(table) >= _MAX_ENTRIES:
        table.clear()


def _parse(body: bytes) -> Progress:
    try:
        return Progress.model_validate_json(body)
    except ValidationError as error:
        message = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise Refusal(400, message) from error


def _caller(status: dict[str, Any]) -> Caller | None:
    """Returns the pod that a token is bound to; None if it is invalid or bound to no pod."""
    if not status.get("authenticated") or names.PROGRESS_AUDIENCE not in (status.get("audiences") or ()):
        return None
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    pod_uid = (extra.get("authentication.kubernetes.io/pod-uid") or [""])[0]
    parts = str(user.get("username", "")).split(":")
    if not pod_uid or parts[:2] != ["system", "serviceaccount"] or len(parts) != 4:
        return None
    return Caller(namespace=parts[2], pod_uid=pod_uid)
