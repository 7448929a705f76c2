"""A resync reports when it was completed, at the start and periodically."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import test_utils, web
from kubernetes.aio import client

from finetune_operator.controller.resync import resync, resync_periodically
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.workqueue import WorkQueue
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.rate_limiter import RateLimiter
from finetune_operator.servers.metrics import Metrics

_LISTS_PER_RESYNC = 3  # of FineTuneJobs, Jobs and pods


class _EmptyApiServer:
    """Lists no objects; the first `overloaded` requests are answered with 503."""

    def __init__(self, overloaded: int = 0) -> None:
        self._overloaded = overloaded
        self.requests = 0

    @asynccontextmanager
    async def client(self) -> AsyncIterator[KubeClient]:
        """Serves requests and yields a client that sends them."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self._list)
        async with test_utils.TestServer(app) as server:
            configuration = client.Configuration()
            configuration.host = f"http://127.0.0.1:{server.port}"
            kube = KubeClient(client.ApiClient(configuration), RateLimiter(1e6, 1000), lambda *_: None)
            yield kube
            await kube.close()

    async def _list(self, _: web.Request) -> web.Response:
        self.requests += 1
        if self.requests <= self._overloaded:
            return web.json_response({"reason": "ServiceUnavailable", "message": "overloaded"}, status=503)
        return web.json_response({"items": [], "metadata": {}})


async def test_every_completed_resync_sets_the_timestamp_metric() -> None:
    metrics, state = Metrics(), ControllerState(WorkQueue())
    timestamps: asyncio.Queue[float] = asyncio.Queue()

    def completed() -> None:
        metrics.last_resync.set_to_current_time()
        value = metrics.registry.get_sample_value("finetune_operator_last_sweep_timestamp_seconds")
        timestamps.put_nowait(value or 0.0)

    async with _EmptyApiServer().client() as kube:
        await resync(kube, state, (), completed)
        first = timestamps.get_nowait()
        assert first > 0
        periodic = asyncio.create_task(resync_periodically(kube, state, (), completed, seconds=0.01))
        assert await asyncio.wait_for(timestamps.get(), 10) > first
        periodic.cancel()


async def test_a_failed_resync_is_not_reported_as_completed_and_the_next_one_follows() -> None:
    api, state = _EmptyApiServer(overloaded=2), ControllerState(WorkQueue())
    requests_at_completion: asyncio.Queue[int] = asyncio.Queue()

    def completed() -> None:
        requests_at_completion.put_nowait(api.requests)

    async with api.client() as kube:
        periodic = asyncio.create_task(resync_periodically(kube, state, (), completed, seconds=0.01))
        assert await asyncio.wait_for(requests_at_completion.get(), 10) == 2 + _LISTS_PER_RESYNC
        periodic.cancel()


async def test_what_was_deleted_before_the_watches_began_is_noticed_soon() -> None:
    state = ControllerState(WorkQueue())
    state.cache.put_body(
        {"metadata": {"namespace": "a", "name": "gone", "uid": "1", "resourceVersion": "1"}, "spec": {}}
    )
    done = asyncio.Event()
    async with _EmptyApiServer().client() as kube:
        periodic = asyncio.create_task(resync_periodically(kube, state, (), done.set, seconds=3600))
        await asyncio.wait_for(done.wait(), 15)
        periodic.cancel()
    assert state.cache.snapshot(("a", "gone")) is None
