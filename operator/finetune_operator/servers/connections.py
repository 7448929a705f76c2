"""Starts the operator's HTTP servers, and limits what their clients can occupy.

Anybody in the cluster may connect. A server has so many connections, so many of one address, and so
much time for headers, for a request and for a connection; the oldest connection of the busiest
address makes room for a new one. Nothing here knows what is served.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

log = logging.getLogger(__name__)

_BODY_CHUNK_BYTES = 16384


@dataclass(frozen=True)
class Limits:
    """Limits one server; times are in seconds."""

    connections: int = 256
    per_address: int = 32
    header_seconds: float = 10.0  # until a request has arrived, on a new connection and an idle one
    request_seconds: float = 15.0  # from the headers to the response
    lifetime_seconds: float = 120.0  # after which a connection is closed between two requests
    linger_seconds: float = 30.0  # after that it is cut off


async def serve(app: web.Application, port: int, name: str, limits: Limits) -> web.AppRunner | None:
    """Serves an app on all addresses until the runner is cleaned up; port 0 turns it off."""
    if port == 0:
        return None
    app.middlewares.append(_within(limits.request_seconds))
    runner = _Runner(
        app,
        limits,
        access_log=None,
        keepalive_timeout=limits.header_seconds,
        max_line_size=1024,
        max_field_size=8190,
        max_headers=64,
        lingering_time=1.0,
        read_bufsize=_BODY_CHUNK_BYTES,
        auto_decompress=False,
    )
    await runner.setup()
    await web.TCPSite(runner, None, port, reuse_address=True).start()
    log.info("server started: name=%s port=%d", name, port)
    return runner


def _within(seconds: float) -> Any:
    @web.middleware
    async def within(request: web.Request, handler: Any) -> web.StreamResponse:
        """Answers 408 if a request takes too long, for instance to send its body."""
        try:
            async with asyncio.timeout(seconds):
                response: web.StreamResponse = await handler(request)
                return response
        except TimeoutError:
            raise web.HTTPRequestTimeout from None

    return within


class _Runner(web.AppRunner):
    """Runs an app on a server with limits."""

    def __init__(self, app: web.Application, limits: Limits, **options: Any) -> None:
        super().__init__(app, **options)
        self._limits = limits

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()
        return LimitedServer(
            plain.request_handler, self._limits, request_factory=plain.request_factory, **plain._kwargs
        )


class LimitedServer(web.Server):
    """Counts connections by address and cuts off those beyond the limits."""

    def __init__(self, handler: Any, limits: Limits, **options: Any) -> None:
        super().__init__(handler, **options)
        self._limits = limits
        self._open: dict[RequestHandler, tuple[str, asyncio.Transport]] = {}  # the oldest first
        self._timers: dict[RequestHandler, list[asyncio.TimerHandle]] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Admits a connection."""
        super().connection_made(handler, transport)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        limits, loop = self._limits, asyncio.get_running_loop()
        end = limits.lifetime_seconds + limits.linger_seconds
        self._open[handler] = (address, transport)
        self._timers[handler] = [
            loop.call_later(limits.lifetime_seconds, handler.close),
            loop.call_later(end, transport.abort),
        ]
        by_address = Counter(address for address, _ in self._open.values())
        if by_address[address] > limits.per_address:
            self._cut_off(address)
        elif len(self._open) > limits.connections:
            self._cut_off(by_address.most_common(1)[0][0])

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forgets a connection."""
        super().connection_lost(handler, exc)
        self._forget(handler)

    def _cut_off(self, address: str) -> None:
        """Aborts the oldest connection of an address."""
        for handler, (other, transport) in self._open.items():
            if other == address:
                self._forget(handler)
                transport.abort()
                return

    def _forget(self, handler: RequestHandler) -> None:
        self._open.pop(handler, None)
        for timer in self._timers.pop(handler, ()):
            timer.cancel()
