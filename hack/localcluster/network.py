"""Derives the addresses of a cluster from its name.

Pure: the addresses in use are an argument.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from localcluster.errors import LocalClusterError

_FIRST, _COUNT = 160, 64  # second octet: 10.160.0.0/16 to 10.223.0.0/16, one /16 per cluster


@dataclass(frozen=True)
class Network:
    """One cluster's /16, as a node sees it.

    `node` is the node's number. The first has the veth pair to the host, whose two ends share the
    first /30, and everything that the cluster serves. Each other node shares a /30 with the first.
    """

    octet: int
    host_interface: str
    node: int = 1

    @property
    def block(self) -> str:
        return f"10.{self.octet}.0.0/16"

    @property
    def host_address(self) -> str:
        return f"10.{self.octet}.0.1"

    @property
    def server_address(self) -> str:
        """The first node's address: that of API server, DNS, S3, Prometheus and MLflow."""
        return f"10.{self.octet}.0.2"

    @property
    def gateway_address(self) -> str:
        """The address of the other end of the node's veth pair."""
        return f"10.{self.octet}.0.{4 * self.node - 3}"

    @property
    def node_address(self) -> str:
        """The node's own address."""
        return f"10.{self.octet}.0.{4 * self.node - 2}"

    @property
    def interface(self) -> str:
        """The first node's end of the veth pair of another node."""
        return f"node-{self.node}"

    @property
    def service_cidr(self) -> str:
        return f"10.{self.octet}.32.0/20"

    @property
    def kubernetes_service(self) -> str:
        return f"10.{self.octet}.32.1"

    @property
    def pods(self) -> str:
        """The addresses of the pods of all nodes."""
        return f"10.{self.octet}.128.0/18"

    @property
    def pod_cidr(self) -> str:
        """The addresses of the node's pods."""
        return f"10.{self.octet}.{112 + 16 * self.node}.0/20"

    @property
    def kwok_pod_cidr(self) -> str:
        return f"10.{self.octet}.192.1/18"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def network_for(name: str, used: Iterable[str]) -> Network:
    """Returns the /16 that the name hashes to, or the next one that is free.

    It overlaps none of `used`, the CIDRs of routes and other clusters. Raises LocalClusterError if
    all are in use.
    """
    taken = [ipaddress.ip_network(cidr, strict=False) for cidr in used]
    digest = _digest(name)
    start = int(digest[:8], 16)
    for step in range(_COUNT):
        octet = _FIRST + (start + step) % _COUNT
        network = Network(octet, host_interface(name))
        block = ipaddress.ip_network(network.block)
        if not any(block.overlaps(other) for other in taken):
            return network
    raise LocalClusterError(
        f"no free network for cluster {name!r}: 10.{_FIRST}.0.0/16 to 10.{_FIRST + _COUNT - 1}.0.0/16 all "
        "overlap a route of this machine; take another cluster down or drop the route"
    )


def host_interface(name: str) -> str:
    """Returns the host end's interface name (15 characters at most), fixed for a cluster's name."""
    return f"ftlc-{_digest(name)[:8]}"
