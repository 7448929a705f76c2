"""A real cluster of two nodes whose network enforces NetworkPolicies: between pods of a node, which
a bridge connects, and between nodes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import localcluster
from localcluster import Cluster, LocalClusterError, cluster
from testkit.busybox import BUSYBOX

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster needs root"),
]
NAME = f"lcp-{os.getpid()}"
OPEN, CLOSED = 8000, 8001
CLIENTS = ("friend-1", "friend-2", "stranger-1", "stranger-2")
_SERVER = (
    "/busybox mkdir -p /tmp/w; echo here > /tmp/w/index; "
    f"/busybox httpd -p {CLOSED} -h /tmp/w; exec /busybox httpd -f -p {OPEN} -h /tmp/w"
)

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def made(busybox: Path) -> Iterator[Cluster]:
    """Has a server on the first node, and a client of each kind on both nodes."""
    one = localcluster.up(NAME, nodes=2, network_policies=True)
    one.load(str(busybox))
    first, second = one.nodes
    pods = [_pod("server", first, _SERVER)]
    for kind in ("friend", "stranger"):
        pods += [_pod(f"{kind}-{n}", node, "exec /busybox sleep 3600") for n, node in ((1, first), (2, second))]
    _apply(one, *pods)
    one.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s")
    yield one
    cluster.down(NAME, purge=True)


@pytest.fixture
def server(made: Cluster) -> Iterator[str]:
    """The server's address. No policy is in force, before and after a test."""
    address = made.kubectl("get", "pod", "server", "-o", "jsonpath={.status.podIP}")
    _wait_until(made, address, {(client, port): True for client in CLIENTS for port in (OPEN, CLOSED)})
    yield address
    made.kubectl("delete", "networkpolicy", "--all")


def test_only_named_pods_reach_a_named_port_from_the_same_node_and_from_another(made: Cluster, server: str) -> None:
    _apply(made, _closed())
    _wait_until(made, server, _only_friends())


def test_a_pod_reaches_only_what_its_policy_names(made: Cluster, server: str) -> None:
    to = [{"podSelector": {"matchLabels": {"kind": "server"}}}]
    egress = [{"to": to, "ports": [{"port": OPEN}]}]
    _apply(made, _policy("out", {"kind": "stranger"}, policyTypes=["Egress"], egress=egress))
    expected = {(client, port): True for client in CLIENTS for port in (OPEN, CLOSED)}
    _wait_until(made, server, expected | {(f"stranger-{n}", CLOSED): False for n in (1, 2)})


def test_policies_that_change_while_the_enforcement_is_down_are_enforced_afterwards(made: Cluster, server: str) -> None:
    made.restart("policies", kill=True)
    _apply(made, _closed())
    _wait_until(made, server, _only_friends())


def test_a_new_pod_at_a_known_place_is_closed_too(made: Cluster, server: str) -> None:
    _apply(made, _closed(), _pod("server-2", made.nodes[1], _SERVER, kind="server"))
    made.kubectl("wait", "--for=condition=Ready", "pod/server-2", "--timeout=60s")
    address = made.kubectl("get", "pod", "server-2", "-o", "jsonpath={.status.podIP}")
    _wait_until(made, address, _only_friends())
    made.kubectl("delete", "pod", "server-2")


def _closed() -> Raw:
    friends = [{"podSelector": {"matchLabels": {"kind": "friend"}}}]
    ingress = [{"from": friends, "ports": [{"port": "open"}]}]
    return _policy("in", {"kind": "server"}, policyTypes=["Ingress"], ingress=ingress)


def _only_friends() -> dict[tuple[str, int], bool]:
    ports = (OPEN, CLOSED)
    return {(client, port): port == OPEN and client.startswith("friend") for client in CLIENTS for port in ports}


def _policy(name: str, labels: Mapping[str, str], **spec: Any) -> Raw:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": labels}, **spec},
    }


def _pod(name: str, node: str, script: str, kind: str = "") -> Raw:
    container = {
        "name": "main",
        "image": BUSYBOX,
        "command": ["/busybox", "sh", "-c", script],
        "securityContext": {"runAsUser": 0},
        "ports": [{"name": "open", "containerPort": OPEN}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"kind": kind or name.split("-")[0]}},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]},
    }


def _apply(made: Cluster, *objects: Raw) -> None:
    made.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def _wait_until(made: Cluster, address: str, expected: Mapping[tuple[str, int], bool]) -> None:
    """Waits until exactly these clients reach these ports of the server at an address."""
    deadline = time.monotonic() + 60
    with ThreadPoolExecutor(len(expected)) as pool:
        while True:
            answers = pool.map(lambda key: _reaches(made, key[0], address, key[1]), expected)
            wrong = {key for key, answer in zip(expected, answers, strict=True) if answer != expected[key]}
            if not wrong:
                return
            assert time.monotonic() < deadline, wrong


def _reaches(made: Cluster, client: str, address: str, port: int) -> bool:
    url = f"http://{address}:{port}/index"
    try:
        made.kubectl("exec", client, "--", "/busybox", "wget", "-q", "-O", "/dev/null", url)
    except LocalClusterError as error:
        if "command terminated with exit code 1" not in str(error):
            raise
        return False
    return True
