"""Starts the operator's HTTP servers, and implements the endpoints for metrics and probes.

It decides nothing: readiness and the values of metrics come from callables.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

log = logging.getLogger(__name__)

NotReadyReason = Callable[[], str]
"""Returns why the replica isn't ready; empty if it is."""


async def serve(app: web.Application, port: int, name: str) -> web.AppRunner | None:
    """Serves an app on all addresses until the runner is cleaned up; port 0 turns it off."""
    if port == 0:
        return None
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, None, port, reuse_address=True).start()
    log.info("server started: name=%s port=%d", name, port)
    return runner


def metrics_app(registry: CollectorRegistry, refresh: Callable[[], None]) -> web.Application:
    """Returns the app that serves `GET /metrics`; `refresh` updates the gauges first."""

    async def metrics(_: web.Request) -> web.Response:
        """Answers a scrape."""
        refresh()
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

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
