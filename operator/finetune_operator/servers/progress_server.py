"""Receives the progress posts of trainer pods.

A bearer token identifies the pod (TokenReview; the kubelet binds the token to it), and the cache
identifies the pod's job, so a pod can only report for its own job, from its own address. Losing a
post, or this server, never disturbs training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from finetune_api import names
from finetune_api.messages.progress import MAX_BODY_BYTES, PostAnswer, Progress, decode
from finetune_api.status import read
from finetune_api.untrusted import line
from finetune_operator.controller.snapshot import Key
from finetune_operator.controller.state import ControllerState
from finetune_operator.core.status import timestamp
from finetune_operator.core.write_policy import shortest_interval
from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.kube.leader_election import Leadership
from finetune_operator.servers.token_reviews import Busy, Caller, TokenReviews, claimed
from finetune_operator.settings import ProgressSettings

_MAX_ENTRIES = 10000  # of each table; a full one is cleared
_POSTS_PER_SECOND = 2.0
_BURST_POSTS = 10.0


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
        self._reviews = TokenReviews(client.review_token)
        self._cache = state.cache
        self._queue = state.queue
        self._progress = state.progress
        self._clock = state.clock
        self._leadership = leadership
        self._settings = settings
        self._count = count
        self._buckets: dict[str, _TokenBucket] = {}  # by uid of the pod
        self._enqueued_at: dict[str, float] = {}  # by uid of the FineTuneJob

    def app(self) -> web.Application:
        """Returns the app that serves `POST /v1/progress`."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post(names.PROGRESS_PATH, self._post)
        return app

    async def _post(self, request: web.Request) -> web.Response:
        try:
            answer = await self._receive(request)
        except Refusal as refusal:
            self._count(refusal.code)
            return web.json_response({"message": refusal.message}, status=refusal.code)
        except web.HTTPException as response:
            self._count(response.status)
            raise
        self._count(200)
        return web.json_response(answer.to_json())

    async def _receive(self, request: web.Request) -> PostAnswer:
        """Stores the progress of a post, and says whose signatures the operator knows.

        Raises Refusal or a redirect to the leader.
        """
        if not self._leadership.is_leader:
            self._redirect_to_leader()
        caller = await self._caller(request)
        self._limit_rate(caller.pod_uid)
        progress = _parse(await request.read())
        key, attempt, uid = self._job_of(caller)
        if progress.attempt != attempt:
            raise Refusal(
                403, f"the pod belongs to attempt {attempt}, but reports progress of attempt {progress.attempt}"
            )
        is_news = self._progress.put(uid, progress, timestamp(self._clock.now()))
        self._enqueue(key, uid, is_news)
        snapshot = self._cache.snapshot(key)
        return PostAnswer(signers=read(snapshot.body.get("status")).signers if snapshot else ())

    def _redirect_to_leader(self) -> None:
        holder = self._leadership.holder
        if holder is None:
            raise Refusal(503, "no replica is the leader at the moment; post again later")
        host = f"[{holder.pod_ip}]" if ":" in holder.pod_ip else holder.pod_ip
        scheme = "https" if self._settings.certificate else "http"
        raise web.HTTPTemporaryRedirect(f"{scheme}://{host}:{self._settings.port}{names.PROGRESS_PATH}")

    async def _caller(self, request: web.Request) -> Caller:
        """Returns the pod that a bearer token identifies.

        Raises Refusal if the token isn't valid, or its pod doesn't post from its own address.
        """
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "a bearer token is required")
        claim = claimed(token, time.time())
        if claim is None:
            raise Refusal(401, f"the token isn't one of a pod for audience {names.PROGRESS_AUDIENCE}")
        self._job_of(claim)  # before anything is spent on a pod that couldn't post anyway
        address = request.remote or ""
        try:
            caller = await self._reviews.caller(token, address)
        except Busy as error:
            raise Refusal(429, "too many tokens are waiting for their review; post again later") from error
        except ApiError as error:
            raise Refusal(
                503, f"the token can't be reviewed at the moment: {error.reason}; post again later"
            ) from error
        if caller is None or caller != claim:
            raise Refusal(401, f"the token isn't valid for audience {names.PROGRESS_AUDIENCE}")
        self._check_address(caller, address)
        return caller

    def _check_address(self, caller: Caller, address: str) -> None:
        """Raises Refusal if a pod with an address of its own posts from another one.

        A post that a proxy in the operator's own pod passes on comes from the loopback.
        """
        pod = self._cache.pod(caller.pod_uid)
        if not self._settings.verify_address or pod is None or not pod.addresses:
            return
        peer = _address(address)
        if peer is None or peer.is_loopback or peer in {_address(text) for text in pod.addresses}:
            return
        raise Refusal(
            403, f"the post comes from {peer}, which isn't the pod's address; if the network of the cluster "
            "translates addresses, turn progress.verifyAddress off"
        )  # fmt: skip

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

    def _enqueue(self, key: Key, uid: str, is_news: bool) -> None:
        """Queues the job for when its status may be due: immediately for news.

        A trainer doesn't repeat a report, so none may be left out.
        """
        now = time.monotonic()
        interval = shortest_interval(self._settings.write_every_seconds)
        last = self._enqueued_at.get(uid, float("-inf"))
        if is_news or now - last >= interval:
            _clear_if_full(self._enqueued_at)
            self._enqueued_at[uid] = now
            self._queue.add(key)
        elif last <= now:
            self._enqueued_at[uid] = last + interval
            self._queue.add_after(key, last + interval - now)


def _clear_if_full(table: dict[str, Any]) -> None:
    """Bounds the memory of a table, whose entries are computed again when needed."""
    if len(table) >= _MAX_ENTRIES:
        table.clear()


def _parse(body: bytes) -> Progress:
    try:
        return decode(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)[:3]
        message = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in details)
        raise Refusal(400, line(message, 512)) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, line(str(error), 512)) from error


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Parses an IP address; one of IPv4 that is written as one of IPv6 is one of IPv4."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
