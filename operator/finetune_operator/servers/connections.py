"""Starts the operator's HTTP servers, and limits what their clients can occupy.

Anybody in the cluster may connect. A server has so many connections, so many of one address, and so
much time for headers, for a request and for a connection; the oldest connection of the busiest
address makes room for a new one. A connection counts from its first packet, before any TLS
handshake. Nothing here knows what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

log = logging.getLogger(__name__)

_BODY_CHUNK_BYTES = 16384
_RETRY_SECONDS = 0.2


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
    plain = web.TCPSite(runner, None, port, reuse_address=True)
    await (plain if context is None else _TlsSite(runner, port, context)).start()
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
        self._open: dict[object, tuple[str, Callable[[], object]]] = {}  # the oldest first
        self._timers: dict[object, list[asyncio.TimerHandle]] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Admits a connection that is ready for requests."""
        super().connection_made(handler, transport)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        self._admit(handler, address, handler.close, transport.abort)

    async def handshake(self, connection: socket.socket, address: str, context: ssl.SSLContext) -> None:
        """Makes the TLS handshake of a connection, which counts meanwhile. Never raises."""

        def abort() -> None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

        waiting = object()
        self._admit(waiting, address, abort, abort)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self, connection, ssl=context, ssl_handshake_timeout=self._limits.handshake_seconds
            )
        except (OSError, asyncio.CancelledError):  # also TimeoutError and ssl.SSLError
            connection.close()
        finally:
            self._forget(waiting)

    def _admit(self, key: object, address: str, close: Callable[[], object], abort: Callable[[], object]) -> None:
        """Counts a connection, and cuts off one of its address or of another if it is too much.

        `close` is called at the end of its lifetime, and `abort` to cut it off.
        """
        limits, loop = self._limits, asyncio.get_running_loop()
        end = limits.lifetime_seconds + limits.linger_seconds
        self._open[key] = (address, abort)
        self._timers[key] = [loop.call_later(limits.lifetime_seconds, close), loop.call_later(end, abort)]
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
        for key, (other, abort) in self._open.items():
            if other == address:
                self._forget(key)
                abort()
                return

    def _forget(self, key: object) -> None:
        """Stops counting a connection."""
        self._open.pop(key, None)
        for timer in self._timers.pop(key, ()):
            timer.cancel()


class _TlsSite(web.BaseSite):
    """Accepts connections itself, so that they count before their handshake."""

    def __init__(self, runner: _Runner, port: int, context: ssl.SSLContext) -> None:
        super().__init__(runner)
        self._port = port
        self._context = context
        self._handshakes: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        """The URL of the site."""
        return f"https://*:{self._port}"

    async def start(self) -> None:
        """Listens on all addresses."""
        await super().start()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(("", self._port), family=family, backlog=128, dualstack_ipv6=dual)
        listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(listener))

    async def stop(self) -> None:
        """Stops accepting, and ends the handshakes that aren't done."""
        for task in (self._accepting, *self._handshakes):
            task.cancel()
        await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)
        await super().stop()

    async def _accept(self, listener: socket.socket) -> None:
        server = self._runner.server
        assert isinstance(server, LimitedServer)  # noqa: S101 (as _Runner makes it)
        with listener:
            while True:
                try:
                    connection, peer = await asyncio.get_running_loop().sock_accept(listener)
                except OSError as error:  # no file descriptor is left, for instance
                    log.warning("a connection can't be accepted: %s", error)
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                task = asyncio.create_task(server.handshake(connection, str(peer[0]), self._context))
                self._handshakes.add(task)
                task.add_done_callback(self._handshakes.discard)
