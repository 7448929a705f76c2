"""Starts the operator's HTTP servers, and limits what their clients can occupy.

Anybody in the cluster may connect. A server has so many connections, so many of one address, and so
much time for headers, for a request and for a connection; the oldest connection of the busiest
address makes room for a new one. A connection counts from its first packet, before any TLS
handshake. New connections and requests also have a rate, since serving them takes the time of the
event loop that reconciles jobs: a connection beyond it is closed unread, which costs next to
nothing. Nothing here knows what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from finetune_operator.servers.rates import Rate, Rates

log = logging.getLogger(__name__)

_requests_log = logging.getLogger(f"{__name__}.requests")
_BODY_CHUNK_BYTES = 16384
_RETRY_SECONDS = 0.2
_REFUSALS_IN_A_ROW = 32  # then the event loop has time for something else
_PAUSE_SECONDS = 0.02
_RATE = Rate(per_second=500.0, burst=1000.0)
_RATE_PER_ADDRESS = Rate(per_second=100.0, burst=400.0)


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
    rate: Rate = _RATE  # of new connections and requests together
    rate_per_address: Rate = _RATE_PER_ADDRESS


async def serve(
    app: web.Application, port: int, name: str, limits: Limits, context: ssl.SSLContext | None = None
) -> web.AppRunner | None:
    """Serves an app on all addresses until the runner is cleaned up; port 0 turns it off.

    With a context, it is served by TLS.
    """
    if port == 0:
        return None
    rates = Rates(limits.rate_per_address, limits.rate)
    app.middlewares.append(_limited(rates))
    app.middlewares.append(_within(limits.request_seconds))
    runner = _Runner(
        app,
        limits,
        access_log=None,
        logger=_requests_log,
        keepalive_timeout=limits.header_seconds,
        max_line_size=1024,
        max_field_size=8190,
        max_headers=64,
        lingering_time=1.0,
        read_bufsize=_BODY_CHUNK_BYTES,
        auto_decompress=False,
    )
    await runner.setup()
    await _Site(runner, port, rates, context).start()
    log.info("server started: name=%s port=%d", name, port)
    return runner


class _OwnErrors(logging.Filter):
    """Leaves out what clients do wrong, which is in their answer: anybody may send any number of
    malformed requests, and each would be a traceback in the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether an error is the operator's own."""
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError | ConnectionError)


_requests_log.addFilter(_OwnErrors())


def _limited(rates: Rates) -> Any:
    @web.middleware
    async def limited(request: web.Request, handler: Any) -> web.StreamResponse:
        """Answers 429, and closes the connection, if an address sends too many requests."""
        if rates.admits(request.remote or "", time.monotonic()):
            response: web.StreamResponse = await handler(request)
            return response
        refusal = web.json_response({"message": "too many requests from this address"}, status=429)
        refusal.force_close()
        return refusal

    return limited


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

    async def begin(self, connection: socket.socket, address: str, context: ssl.SSLContext | None) -> None:
        """Serves a connection, after the TLS handshake if there is a context. Never raises.

        It counts during the handshake.
        """
        if context is None:
            await self._connect(connection)
            return

        def abort() -> None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

        waiting = object()
        self._admit(waiting, address, abort, abort)
        try:
            await self._connect(connection, ssl=context, ssl_handshake_timeout=self._limits.handshake_seconds)
        finally:
            self._forget(waiting)

    async def _connect(self, connection: socket.socket, **options: Any) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self, connection, **options)
        except (OSError, asyncio.CancelledError):  # also TimeoutError and ssl.SSLError
            connection.close()

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


class _Site(web.BaseSite):
    """Accepts connections itself, so that they count before a handshake, or are closed at once."""

    def __init__(self, runner: _Runner, port: int, rates: Rates, context: ssl.SSLContext | None) -> None:
        super().__init__(runner)
        self._port = port
        self._rates = rates
        self._context = context
        self._beginnings: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        """The URL of the site."""
        return f"{'https' if self._context else 'http'}://*:{self._port}"

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
        for task in (self._accepting, *self._beginnings):
            task.cancel()
        await asyncio.gather(self._accepting, *self._beginnings, return_exceptions=True)
        await super().stop()

    async def _accept(self, listener: socket.socket) -> None:
        server = self._runner.server
        assert isinstance(server, LimitedServer)  # noqa: S101 (as _Runner makes it)
        refusals = 0
        with listener:
            while True:
                try:
                    connection, peer = await asyncio.get_running_loop().sock_accept(listener)
                except OSError as error:  # no file descriptor is left, for instance
                    log.warning("a connection can't be accepted: %s", error)
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                address = str(peer[0])
                if not self._rates.admits(address, time.monotonic()):
                    connection.close()
                    refusals += 1
                    if refusals % _REFUSALS_IN_A_ROW == 0:
                        await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                task = asyncio.create_task(server.begin(connection, address, self._context))
                self._beginnings.add(task)
                task.add_done_callback(self._beginnings.discard)
                await asyncio.sleep(0)  # accepting needn't wait while others do
