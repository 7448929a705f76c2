"""A client that connects or asks too often is refused, and nobody else is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from finetune_operator.servers import rates
from finetune_operator.servers.connections import Limits, serve
from finetune_operator.servers.rates import Rate, Rates

_SLOW = Rate(per_second=2.0, burst=5.0)
_FLOOD, _OTHER = "127.0.0.2", "127.0.0.3"


def _admitted(limits: Rates, address: str, count: int, now: float) -> int:
    return sum(limits.admits(address, now) for _ in range(count))


def test_an_address_has_a_burst_and_a_rate() -> None:
    limits = Rates(_SLOW, Rate(1000.0, 1000.0))
    assert _admitted(limits, "a", 100, 10.0) == 5
    assert _admitted(limits, "a", 100, 10.4) == 0
    assert _admitted(limits, "a", 100, 10.5) == 1
    assert _admitted(limits, "a", 100, 1000.0) == 5
    assert _admitted(limits, "a", 100, 999.0) == 0, "a clock never gives tokens twice"


def test_what_an_address_may_not_do_costs_the_others_nothing() -> None:
    limits = Rates(Rate(per_second=2.0, burst=40.0), Rate(per_second=1.0, burst=60.0))
    assert _admitted(limits, "flood", 1000, 0.0) == 40
    assert _admitted(limits, "b", 1000, 0.0) == 20, "all addresses together have a rate, too"


def test_floods_of_several_addresses_leave_those_that_do_little_alone() -> None:
    limits = Rates(Rate(per_second=100.0, burst=400.0), Rate(per_second=500.0, burst=1000.0))
    lost = []
    for tick in range(1500):  # 15 seconds
        now = tick / 100
        for flood in range(20):
            _admitted(limits, f"flood-{flood}", 5, now)
        if tick % 100 == 99:
            lost += [now for pod in range(50) if not limits.admits(f"pod-{pod}", now)]
    assert not lost


def test_the_reserve_has_a_rate() -> None:
    limits = Rates(_SLOW, Rate(per_second=1.0, burst=12.0))
    assert sum(limits.admits(f"address-{number}", 0.0) for number in range(100)) == 24


def test_addresses_without_end_cost_a_bounded_memory() -> None:
    limits = Rates(_SLOW, Rate(1e9, 1e9))
    assert all(limits.admits(f"address-{number}", 0.0) for number in range(2 * rates.MAX_ADDRESSES + 1))
    assert len(limits._addresses) <= rates.MAX_ADDRESSES


@asynccontextmanager
async def _server(rate: Rate) -> AsyncIterator[int]:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="served")

    app = web.Application()
    app.router.add_get("/", answer)
    listener = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port: int = listener.sockets[0].getsockname()[1]
    listener.close()
    runner = await serve(app, port, "test", Limits(rate_per_address=rate))
    assert runner is not None
    try:
        yield port
    finally:
        await runner.cleanup()


async def _get(port: int, address: str, requests: int = 1) -> bytes:
    """Returns what the server sends for requests on one connection; empty if it closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    answer = b""
    with contextlib.suppress(ConnectionError):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * (requests - 1))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


async def test_connections_beyond_the_rate_are_closed_and_others_are_served() -> None:
    async with _server(Rate(per_second=1.0, burst=20.0)) as port:
        answers = [await _get(port, _FLOOD) for _ in range(60)]
        served = [answer for answer in answers if answer.endswith(b"served")]
        assert 10 <= len(served) <= 13
        assert set(answers) - set(served) == {b""}
        assert (await _get(port, _OTHER)).endswith(b"served")


async def test_requests_beyond_the_rate_are_refused_on_an_open_connection() -> None:
    async with _server(Rate(per_second=1.0, burst=10.0)) as port:
        answer = await _get(port, _FLOOD, requests=30)
        assert answer.count(b"served") in (9, 10)
        assert answer.count(b" 429 ") == 1, "the refusal also ends the connection"
        assert (await _get(port, _OTHER)).endswith(b"served")


@pytest.mark.parametrize(
    "request_bytes",
    [b"GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
     b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"],
)  # fmt: skip
async def test_a_malformed_request_costs_no_line_in_the_log(
    request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with _server(Rate(1000.0, 1000.0)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes)
        with contextlib.suppress(OSError):
            assert await reader.read(12) in (b"HTTP/1.0 400", b"HTTP/1.1 400", b"")
        writer.close()
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
