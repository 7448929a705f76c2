"""The store of a job is behind a door that opens only for those who know the attempt's secret."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from finetune_api import names
from finetune_trainer.log import Log
from finetune_trainer.supervisor import node as node_module
from finetune_trainer.supervisor.rendezvous.relay import LOOPBACK, Gate, Tunnel
from trainer.support.rank_runs import free_port
from trainer.support.supervisor_process import JobSetup

_SECRET = b"c0ffee" * 10
_GREETING = b"finetune-rendezvous/1\n"


class _Store:
    """Listens like rank 0's store, counts connections and returns what it gets."""

    def __init__(self) -> None:
        self._server = socket.create_server((LOOPBACK, 0))
        self.port: int = self._server.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self.connections += 1
                threading.Thread(target=self._return, args=(connection,), daemon=True).start()

    def _return(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while data := connection.recv(4096):
                connection.sendall(data)


@contextmanager
def _gate(store_port: int) -> Iterator[Gate]:
    gate = Gate(free_port(), store_port, _SECRET, Log())
    try:
        yield gate
    finally:
        gate.close()


@contextmanager
def _tunnel(port: int, secret: bytes = _SECRET) -> Iterator[Tunnel]:
    tunnel = Tunnel(LOOPBACK, port, secret)
    try:
        yield tunnel
    finally:
        tunnel.close()


def _connect(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), timeout=60)


def _answer(connection: socket.socket, message: bytes) -> bytes:
    with connection:
        connection.sendall(message)
        return connection.recv(4096)


def test_a_node_that_knows_the_secret_reaches_the_store() -> None:
    store = _Store()
    with _gate(store.port) as gate, _tunnel(gate.port) as tunnel:
        assert _answer(_connect(tunnel.port), b"hello" * 100) == b"hello" * 100
        assert store.connections == 1


def _silent(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


def _of_the_store(connection: socket.socket) -> None:
    connection.sendall(b"\x0f\x00\x00\x00validate")


def _greeting_and_digits(connection: socket.socket) -> None:
    connection.sendall(_GREETING + os.urandom(32) + os.urandom(32))


def _what_the_gate_said(connection: socket.socket) -> None:
    """Returns the gate's own number and digest."""
    connection.sendall(_GREETING + os.urandom(32))
    connection.sendall(connection.recv(64, socket.MSG_WAITALL)[32:])


@pytest.mark.parametrize("attempt", [_silent, _of_the_store, _greeting_and_digits, _what_the_gate_said])
def test_a_stranger_never_reaches_the_store(attempt: Callable[[socket.socket], None]) -> None:
    store = _Store()
    with _gate(store.port) as gate:
        with _connect(gate.port) as connection:
            attempt(connection)
            with suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
        assert store.connections == 0


def test_a_node_with_another_secret_reaches_nothing() -> None:
    """It doesn't give away anything either: its rank waits, as if node 0 weren't there yet."""
    store = _Store()
    with _gate(store.port) as gate, _tunnel(gate.port, b"another attempt's") as tunnel:
        with _connect(tunnel.port) as connection:
            connection.settimeout(1)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        assert store.connections == 0


def test_a_node_tells_a_false_node_0_nothing() -> None:
    """Whoever answers in place of node 0 gets a random number, and no byte of the ranks."""
    false = socket.create_server((LOOPBACK, 0))
    with false, _tunnel(false.getsockname()[1]) as tunnel, _connect(tunnel.port) as rank:
        rank.sendall(b"a row of the data set")
        connection, _ = false.accept()
        with connection:
            connection.settimeout(60)
            greeting = connection.recv(len(_GREETING) + 32, socket.MSG_WAITALL)
            assert greeting.startswith(_GREETING)
            connection.sendall(os.urandom(64))
            assert connection.recv(4096) == b""


def test_strangers_without_number_dont_keep_a_node_out() -> None:
    store = _Store()
    with _gate(store.port) as gate:
        strangers = [_connect(gate.port) for _ in range(300)]
        try:
            with _tunnel(gate.port) as tunnel:
                assert _answer(_connect(tunnel.port), b"hello") == b"hello"
        finally:
            for stranger in strangers:
                stranger.close()


def test_the_store_of_pytorch_works_through_gate_and_tunnel() -> None:
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    limit = timedelta(seconds=60)
    store = TCPStore(
        LOOPBACK, port, 2, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listener.detach(),
    )  # fmt: skip
    with _gate(port) as gate, _tunnel(gate.port) as tunnel:
        other = TCPStore(LOOPBACK, tunnel.port, 2, is_master=False, timeout=limit)
        store.set("key", "value" * 10_000)
        assert other.get("key") == b"value" * 10_000


def test_a_node_reads_the_secret_next_to_its_configuration(tmp_path: Path) -> None:
    run = JobSetup(tmp_path).run()
    (tmp_path / "run.json").write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    environment = {names.ENV_RUN_CONFIG: str(tmp_path / "run.json")}
    assert node_module.parse(environment).rendezvous_secret == b""
    (tmp_path / names.RENDEZVOUS_FILE).write_bytes(_SECRET)
    node = node_module.parse(environment)
    assert node.rendezvous_secret == _SECRET
    assert _SECRET.decode() not in repr(node)
