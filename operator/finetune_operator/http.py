"""http: the operator's three small servers: metrics, probes and progress. Started by the door; knows no job."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

log = logging.getLogger(__name__)

Ready = Callable[[], str]
"""Empty where ready, else what is missing."""


async def serve(app: web.Application, port: int, what: str) -> web.AppRunner | None:
    """Serves on all addresses until the runner is cleaned up; port 0 means not at all."""
    if port == 0:
        return None
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, None, port, reuse_address=True).start()
    log.info("serving %s on port %d", what, port)
    return runner


def metrics_app(registry: CollectorRegistry, refresh: Callable[[], None]) -> web.Application:
    """`GET /metrics`; `refresh` brings gauges up to date first."""

    async def metrics(_: web.Request) -> web.Response:
        refresh()
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    return app


def probes_app(ready: Ready) -> web.Application:
    """`GET /livez`: the event loop answers. `GET /readyz`: it leads with a full cache, or stands by."""

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        missing = ready()
        return web.Response(text=f"{missing or 'ok'}\n", status=503 if missing else 200)

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    return app
