"""Opens the way on which the ranks of all nodes find each other, for the time of an attempt."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from finetune_trainer.log import Log
from finetune_trainer.supervisor.node import Node
from finetune_trainer.supervisor.rendezvous.relay import LOOPBACK, Gate, Tunnel


@contextmanager
def rendezvous(node: Node, log: Log) -> Iterator[Node]:
    """Yields the node as its ranks see it: for them, the store is always on the loopback address.

    An operator of an older version gives the pods no secret. Then the nodes take any other node for
    one of theirs, as they did before.
    """
    world = node.run.world
    if world.nodes == 1:
        yield _with_store(node, world.master_port)
        return
    secret = node.rendezvous_secret
    if not secret:
        log.warning("the operator gave no secret for the rendezvous; update it to the version of this image")
    if not node.leads:
        tunnel = Tunnel(world.master_address, world.master_port, secret)
        try:
            yield _with_store(node, tunnel.port)
        finally:
            tunnel.close()
        return
    store_port = _free_port()
    gate = Gate(world.master_port, store_port, secret, log)
    try:
        yield _with_store(node, store_port)
    finally:
        gate.close()


def _with_store(node: Node, port: int) -> Node:
    world = node.run.world.model_copy(update={"master_address": LOOPBACK, "master_port": port})
    return replace(node, run=node.run.model_copy(update={"world": world}))


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])
