"""Implements the endpoints for metrics and probes.

It decides nothing: readiness and the values of metrics come from callables.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

_SHARED_SECONDS = 1.0

NotReadyReason = Callable[[], str]
"""Returns why the replica isn't ready; empty if it is."""


class Exposition:
    """Makes the text of all metrics, at most once a second, in a thread and for all scrapes."""

    def __init__(self, registry: CollectorRegistry, refresh: Callable[[], None]) -> None:
        self._registry = registry
        self._refresh = refresh
        self._text = b""
        self._made_at = -math.inf  # monotonic
        self._making = asyncio.Lock()

    async def text(self) -> bytes:
        """Returns the text; `refresh` has updated the gauges before it was made."""
        async with self._making:
            if time.monotonic() - self._made_at >= _SHARED_SECONDS:
                self._refresh()
                self._text = await asyncio.to_thread(generate_latest, self._registry)
                self._made_at = time.monotonic()
            return self._text


def metrics_app(registry: CollectorRegistry, refresh: Callable[[], None]) -> web.Application:
    """Returns the app that serves `GET /metrics`; `refresh` updates the gauges first."""
    exposition = Exposition(registry, refresh)

    async def metrics(_: web.Request) -> web.Response:
        """Answers a scrape."""
        return web.Response(body=await exposition.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    return app


def probes_app(not_ready_reason: NotReadyReason) -> web.Application:
    """Returns the app that serves the probes.

    `GET /livez` succeeds while the event loop runs. `GET /readyz` succeeds if this replica leads
    and its cache is filled, or if it stands by for another leader.
    """

    async def livez(_: web.Request) -> web.Response:
        """Answers the liveness probe."""
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        """Answers the readiness probe with ok, or with 503 and the reason."""
        reason = not_ready_reason()
        return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    return app
