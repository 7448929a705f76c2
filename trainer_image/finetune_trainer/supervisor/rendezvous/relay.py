"""Connects the ranks of other nodes with the store of rank 0, which listens on loopback only.

Node 0 has a `Gate` and every other node a `Tunnel`. The ranks of a node connect to the tunnel as if
it were the store. The tunnel connects to the gate, and the gate to the store, but only after both
have proved that they know the secret of the attempt. From then on, bytes are copied as they are.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from abc import ABC, abstractmethod
from asyncio import StreamReader, StreamWriter
from collections import Counter
from contextlib import suppress

from finetune_trainer.log import Log
from finetune_trainer.supervisor.rendezvous.handshake import Rejected, check_peer, introduce

LOOPBACK = "127.0.0.1"
_HANDSHAKE_SECONDS = 5.0
_MAX_STRANGERS = 256  # connections that haven't proved anything yet
_MAX_STRANGERS_OF_ADDRESS = 32
_RETRY_SECONDS = 0.2
_CHUNK_BYTES = 1 << 16
_FAILURES = (OSError, EOFError, TimeoutError, Rejected)


class _Relay(ABC):
    """Accepts connections in a thread of its own, until it is closed."""

    def __init__(self, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, sock=listener))
        self._thread = threading.Thread(target=self._loop.run_forever, name="rendezvous", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all connections."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (asyncio calls this in a task)
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass
        except _FAILURES:
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    @abstractmethod
    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Handles one connection until it ends."""


class Gate(_Relay):
    """Lets nodes that know the secret connect to the store on `store_port`."""

    def __init__(self, port: int, store_port: int, secret: bytes, log: Log) -> None:
        self._store_port = store_port
        self._secret = secret
        self._log = log
        self._strangers: Counter[str] = Counter()
        self._rejected = 0
        super().__init__(_listener(port))

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        address = str((writer.get_extra_info("peername") or ("unknown",))[0])
        if self._strangers.total() >= _MAX_STRANGERS or self._strangers[address] >= _MAX_STRANGERS_OF_ADDRESS:
            return
        self._strangers[address] += 1
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                await check_peer(reader, writer, self._secret)
        except _FAILURES:
            self._count_rejected(address)
            raise
        finally:
            self._strangers[address] -= 1
            if not self._strangers[address]:
                del self._strangers[address]
        store_reader, store_writer = await _connected(LOOPBACK, self._store_port)
        await _copy_both(reader, writer, store_reader, store_writer)

    def _count_rejected(self, address: str) -> None:
        """Logs the 1st, the 10th, the 100th … rejected connection."""
        self._rejected += 1
        if str(self._rejected).rstrip("0") == "1":
            self._log.warning(
                "a connection to the rendezvous was rejected; it didn't know the secret of the attempt",
                address=address,
                rejected=self._rejected,
            )


class Tunnel(_Relay):
    """Connects the ranks of this node with the gate of node 0 at `host` and `port`."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self._gate = (host, port)
        self._secret = secret
        super().__init__(socket.create_server((LOOPBACK, 0)))

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        while True:
            gate_reader, gate_writer = await _connected(*self._gate)
            try:
                async with asyncio.timeout(_HANDSHAKE_SECONDS):
                    await introduce(gate_reader, gate_writer, self._secret)
                break
            except _FAILURES:  # the gate is busy, or the name still leads to another pod
                gate_writer.close()
                await asyncio.sleep(_RETRY_SECONDS)
        await _copy_both(reader, writer, gate_reader, gate_writer)


def _listener(port: int) -> socket.socket:
    """Returns a socket that listens on all addresses. A node may have IPv6 switched off."""
    try:
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise
        return socket.create_server(("", port))


async def _connected(host: str, port: int) -> tuple[StreamReader, StreamWriter]:
    """Connects as soon as somebody listens there. The caller cancels it."""
    while True:
        try:
            return await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(_RETRY_SECONDS)


async def _copy_both(
    reader: StreamReader, writer: StreamWriter, other_reader: StreamReader, other_writer: StreamWriter
) -> None:
    try:
        await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))
    finally:
        other_writer.close()


async def _copy(reader: StreamReader, writer: StreamWriter) -> None:
    """Copies until one end closes its connection, which closes the other one too."""
    with suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()
