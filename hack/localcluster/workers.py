"""Further nodes of a cluster, each in namespaces of its own, and their faults.

The first node routes between them, and between them and this machine. A node can be cut off from
the network, and its power can be switched off and on.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from localcluster import enforcement, node, sandbox
from localcluster.components import Layout
from localcluster.errors import LocalClusterError
from localcluster.network import Network
from localcluster.paths import ClusterPaths
from localcluster.pki import kubeconfig, node_identities, sign


@dataclass(frozen=True)
class Worker:
    """A further node: its layout, and the folders of the cluster that it belongs to."""

    layout: Layout
    cluster: ClusterPaths

    @property
    def network(self) -> Network:
        """The node's addresses."""
        return self.layout.network


def worker(layout: Layout, number: int) -> Worker:
    """Returns the node with this number (2 or more) of the cluster that `layout` describes."""
    network = replace(layout.network, node=number)
    return Worker(Layout(layout.spec, layout.paths.node(number), network), layout.paths)


def start(layout: Layout, number: int, tools: dict[str, Path]) -> None:
    """Starts a node for the first time, or again after `switch_off`.

    It doesn't wait until the node is ready.
    """
    one = worker(layout, number)
    paths = one.layout.paths
    pid = sandbox.start_namespaces(paths)
    _connect(one, pid)
    _hand_out_credentials(one)
    node.start_runtime(one.layout, tools["pause"])
    node.start_node(one.layout, tools)
    if layout.spec.network_policies:
        enforcement.start(one.layout, tools["policies"], one.cluster.etc / "admin.kubeconfig")


def switch_off(layout: Layout, number: int) -> None:
    """Ends everything that runs on the node at once, as if its power failed; its disk stays."""
    one = worker(layout, number)
    sandbox.end_node(one.layout.paths, one.layout.cgroup)
    shutil.rmtree(one.layout.paths.run, ignore_errors=True)


def set_link(layout: Layout, number: int, *, up: bool) -> None:
    """Cuts the node off from the network, or connects it again. What runs on it goes on."""
    one = worker(layout, number)
    pid = sandbox.init_pid(one.cluster.root)
    if pid is None:
        raise LocalClusterError(f"cluster {layout.spec.name!r} is not up; run `up` first")
    lines = [f"link set {one.network.interface} {'up' if up else 'down'}"]
    if up:  # the kernel drops a route when its interface goes down
        lines.append(f"route replace {one.network.pod_cidr} via {one.network.node_address}")
    sandbox.configure_network(pid, lines)


def _connect(one: Worker, pid: int) -> None:
    network = one.network
    first = sandbox.init_pid(one.cluster.root)
    if first is None:
        raise LocalClusterError(f"cluster {one.layout.spec.name!r} is not up; run `up` first")
    sandbox.link(first, network.interface, pid)
    sandbox.configure_network(
        first,
        (
            f"addr add {network.gateway_address}/30 dev {network.interface}",
            f"link set {network.interface} up",
        ),
    )
    sandbox.configure_network(
        pid,
        (
            "link set lo up",
            f"addr add {network.node_address}/30 dev eth0",
            "link set eth0 up",
            f"route add default via {network.gateway_address}",
        ),
    )
    sandbox.configure_network(first, (f"route replace {network.pod_cidr} via {network.node_address}",))


def _hand_out_credentials(one: Worker) -> None:
    """Gives the node certificates of its own, signed by the cluster, and kubeconfigs."""
    paths, cluster = one.layout.paths, one.cluster
    paths.pki.mkdir(parents=True, exist_ok=True)
    authority = [paths.pki / name for name in ("ca.crt", "ca.key")]
    for file in authority:
        shutil.copy(cluster.pki / file.name, file)
    sign(paths.pki, node_identities(one.layout.node_name, one.network.node_address))
    authority[1].unlink()
    text = kubeconfig(paths.pki, "node", one.layout.server, f"localcluster-{one.layout.spec.name}")
    (paths.etc / "node.kubeconfig").write_text(text)
    shutil.copy(cluster.etc / "proxy.kubeconfig", paths.etc / "proxy.kubeconfig")
