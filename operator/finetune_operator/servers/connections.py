"""Starts the operator's HTTP servers, and limits what their clients can occupy.

Anybody in the cluster may connect. A server has so many connections, so many of one address, and so
much time for headers, for a request and for a connection; the oldest connection of the busiest
address makes room for a new one. A connection counts from its first packet, before any TLS
handshake. Nothing here knows what is served.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

log = logging.getLogger(__name__)

_BODY_CHUNK_BYTES = 16384


@dataclass(frozen=True)
class Limits:
    """Limits one server; times are in seconds."""

    connections: int = 256
    per_address: int = 32
    handshake_seconds: float = 5.0  # of TLS
    header_seconds: float = 10.0  # until a request has arrived, on a new connection and an idle one
    request_seconds: float = 15.0  # from the headers to the response
    lifetime_seconds: float = 120.0  # after which a connection is closed between two requests
    linger_seconds: float = 30.0  # after that it is cut off


async def serve(
    app: web.Application, port: int, name: str, limits: Limits, context: ssl.SSLContext | None = None
) -> web.AppRunner | None:
    """Serves an app on all addresses until the runner is cleaned up; port 0 turns it off.

    With a context, it is served by TLS.
    """
    if port == 0:
        return None
    app.middlewares.append(_within(limits.request_seconds))
    runner = _Runner(
        app,
        limits,
        context,
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

    def __init__(
        self, app: web.Application, limits: Limits, context: ssl.SSLContext | None = None, **options: Any
    ) -> None:
        super().__init__(app, **options)
        self._limits = limits
        self._context = context

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()
        return LimitedServer(
            plain.request_handler, self._limits, self._context, request_factory=plain.request_factory, **plain._kwargs
        )


class LimitedServer(web.Server):
    """Counts connections by address and cuts off those beyond the limits."""

    def __init__(self, handler: Any, limits: Limits, context: ssl.SSLContext | None = None, **options: Any) -> None:
        super().__init__(handler, **options)
        self._limits = limits
        self._context = context
        self._open: dict[asyncio.BaseProtocol, tuple[str, asyncio.Transport]] = {}  # the oldest first
        self._timers: dict[asyncio.BaseProtocol, list[asyncio.TimerHandle]] = {}

    def __call__(self) -> Any:
        """Returns the protocol of a new connection."""
        handler = super().__call__()
        return handler if self._context is None else _Handshake(self, handler, self._context)

    @property
    def handshake_seconds(self) -> float:
        """The time for a TLS handshake."""
        return self._limits.handshake_seconds

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Admits a connection that is ready for requests."""
        super().connection_made(handler, transport)
        self.admit(handler, transport, handler.close)

    def admit(self, protocol: asyncio.BaseProtocol, transport: asyncio.Transport, close: Callable[[], object]) -> None:
        """Counts a connection, and cuts off one of its address or of another if it is too much.

        `close` is called at the end of its lifetime.
        """
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        limits, loop = self._limits, asyncio.get_running_loop()
        end = limits.lifetime_seconds + limits.linger_seconds
        self._open[protocol] = (address, transport)
        self._timers[protocol] = [
            loop.call_later(limits.lifetime_seconds, close),
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
        self.forget(handler)

    def _cut_off(self, address: str) -> None:
        """Aborts the oldest connection of an address."""
        for handler, (other, transport) in self._open.items():
            if other == address:
                self.forget(handler)
                transport.abort()
                return

    def forget(self, handler: asyncio.BaseProtocol) -> None:
        """Stops counting a connection."""
        self._open.pop(handler, None)
        for timer in self._timers.pop(handler, ()):
            timer.cancel()


class _Handshake(asyncio.Protocol):
    """Holds a connection until its TLS handshake is done, and then passes it to the handler."""

    def __init__(self, server: LimitedServer, handler: RequestHandler, context: ssl.SSLContext) -> None:
        self._server = server
        self._handler = handler
        self._context = context
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Counts the connection and starts the handshake."""
        stream = cast(asyncio.Transport, transport)
        self._server.admit(self, stream, stream.abort)
        stream.pause_reading()  # what arrives belongs to the handshake
        self._task = asyncio.get_running_loop().create_task(self._upgrade(stream))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forgets a connection that ends before its handshake has begun."""
        self._server.forget(self)

    async def _upgrade(self, transport: asyncio.Transport) -> None:
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                transport,
                self._handler,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._server.handshake_seconds,
            )
        except (OSError, TimeoutError):  # ssl.SSLError is an OSError
            transport.abort()
            return
        finally:
            self._server.forget(self)
        if encrypted is None or encrypted.is_closing() or transport.is_closing():
            transport.abort()
            return
        self._handler.connection_made(encrypted)
