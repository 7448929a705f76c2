"""progress: takes the posts of trainer pods. Started by the door beside the other servers.

A bearer token says which pod posts (TokenReview, bound to the pod by the kubelet), the cache says which job that pod
belongs to; a pod can only speak for its own job. Losing a post, or this server, never disturbs training.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from finetune_api import names
from finetune_api.progress import MAX_BODY_BYTES, Progress
from finetune_operator.cache import Cache, Key
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.leader import Leadership
from finetune_operator.queue import Queue
from finetune_operator.reports import Reports
from finetune_operator.settings import ProgressSettings
from finetune_operator.status import timestamp

log = logging.getLogger(__name__)

_REVIEW_SECONDS = 60.0  # how long a review of a token is believed
_MAX_REVIEWS = 10000
_POSTS_PER_SECOND = 2.0
_POSTS_AT_ONCE = 10.0


@dataclass(frozen=True)
class Caller:
    """Whom a valid token speaks for."""

    namespace: str
    pod_uid: str


@dataclass
class _Allowance:
    posts: float
    counted_at: float


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ProgressDesk:
    """Takes posts while this replica leads, else names the leader."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        queue: Queue,
        reports: Reports,
        leadership: Leadership,
        settings: ProgressSettings,
        count: Callable[[int], None],
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._queue = queue
        self._reports = reports
        self._leadership = leadership
        self._settings = settings
        self._count = count
        self._reviews: dict[str, tuple[Caller | None, float]] = {}
        self._allowances: dict[str, _Allowance] = {}
        self._enqueued: dict[str, float] = {}

    def app(self) -> web.Application:
        """`POST /v1/progress`."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post(names.PROGRESS_PATH, self._post)
        return app

    async def _post(self, request: web.Request) -> web.Response:
        try:
            await self._take(request)
        except Refusal as refusal:
            self._count(refusal.code)
            return web.json_response({"message": refusal.message}, status=refusal.code)
        except web.HTTPException as answer:
            self._count(answer.status)
            raise
        self._count(200)
        return web.json_response({})

    async def _take(self, request: web.Request) -> None:
        if not self._leadership.is_leader:
            self._send_to_leader()
        caller = await self._caller(request.headers.get("Authorization", ""))
        self._spend(caller.pod_uid)
        key, attempt, uid = self._job_of(caller)
        progress = _parse(await request.read())
        if progress.attempt != attempt:
            raise Refusal(403, f"the pod is of attempt {attempt}, but speaks of attempt {progress.attempt}")
        new_phase = self._reports.put(uid, progress, timestamp(datetime.now(UTC)))
        self._enqueue(key, uid, new_phase)

    def _send_to_leader(self) -> None:
        holder = self._leadership.holder
        if holder is None:
            raise Refusal(503, "no replica leads at the moment; post again later")
        host = f"[{holder.pod_ip}]" if ":" in holder.pod_ip else holder.pod_ip
        raise web.HTTPTemporaryRedirect(f"http://{host}:{self._settings.port}{names.PROGRESS_PATH}")

    async def _caller(self, authorization: str) -> Caller:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "a bearer token is needed")
        digest = hashlib.sha256(token.encode()).hexdigest()
        known = self._reviews.get(digest)
        if known is None or time.monotonic() - known[1] > _REVIEW_SECONDS:
            known = (await self._review(token), time.monotonic())
            self._remember(digest, known)
        if known[0] is None:
            raise Refusal(401, f"the token isn't valid for audience {names.PROGRESS_AUDIENCE}")
        return known[0]

    async def _review(self, token: str) -> Caller | None:
        try:
            status = await self._cluster.review_token(token, names.PROGRESS_AUDIENCE)
        except ApiError as error:
            raise Refusal(503, f"the token can't be reviewed now: {error.reason}") from error
        return _caller(status)

    def _remember(self, digest: str, review: tuple[Caller | None, float]) -> None:
        if len(self._reviews) >= _MAX_REVIEWS:
            self._reviews.clear()
        self._reviews[digest] = review

    def _spend(self, pod_uid: str) -> None:
        """A pod may post a little faster than it is asked to; a flood costs it its own posts only."""
        now = time.monotonic()
        if len(self._allowances) >= _MAX_REVIEWS:
            self._allowances.clear()
        known = self._allowances.get(pod_uid) or _Allowance(_POSTS_AT_ONCE, now)
        posts = min(_POSTS_AT_ONCE, known.posts + (now - known.counted_at) * _POSTS_PER_SECOND)
        self._allowances[pod_uid] = _Allowance(max(posts - 1.0, -1.0), now)
        if posts < 1.0:
            raise Refusal(429, "too many posts; slow down")

    def _job_of(self, caller: Caller) -> tuple[Key, int, str]:
        """The caller's FineTuneJob, attempt and uid."""
        pod = self._cache.pod(caller.pod_uid)
        owner = self._cache.owner_of(pod) if pod and pod.namespace == caller.namespace else None
        if owner is None or owner[1].role != names.ROLE_TRAINER:
            raise Refusal(403, "the token's pod is no trainer pod of a FineTuneJob")
        key, job = owner
        family = self._cache.family(key)
        if family is None or not family.attempts or family.attempts[-1].job.uid != job.uid:
            raise Refusal(403, f"the token's pod is of attempt {job.attempt}, which isn't the current one")
        return key, job.attempt, job.owner_uid

    def _enqueue(self, key: Key, uid: str, new_phase: bool) -> None:
        """A look at the job where its status may be due: at once on a new phase, else now and then."""
        now = time.monotonic()
        if new_phase or now - self._enqueued.get(uid, 0.0) >= self._settings.write_every_seconds:
            if len(self._enqueued) >= _MAX_REVIEWS:
                self._enqueued.clear()
            self._enqueued[uid] = now
            self._queue.add(key)


def _parse(body: bytes) -> Progress:
    try:
        return Progress.model_validate_json(body)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise Refusal(400, wrong) from error


def _caller(status: dict[str, Any]) -> Caller | None:
    """The pod that a reviewed token is bound to; None where it isn't valid, or bound to no pod."""
    if not status.get("authenticated") or names.PROGRESS_AUDIENCE not in (status.get("audiences") or ()):
        return None
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    pod_uid = (extra.get("authentication.kubernetes.io/pod-uid") or [""])[0]
    parts = str(user.get("username", "")).split(":")
    if not pod_uid or parts[:2] != ["system", "serviceaccount"] or len(parts) != 4:
        return None
    return Caller(namespace=parts[2], pod_uid=pod_uid)
