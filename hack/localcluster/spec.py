"""The options of a cluster and the access to its object storage, as frozen values. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from localcluster.errors import LocalClusterError

ADDONS = ("s3", "prometheus", "mlflow")
MOST_NODES = 4
BUCKETS = ("models", "data", "outputs")
S3_REGION = "us-east-1"
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?")


@dataclass(frozen=True)
class S3:
    """Access to the object storage add-on; the same from the host and from pods."""

    endpoint: str
    access_key_id: str
    secret_access_key: str
    region: str = S3_REGION


@dataclass(frozen=True)
class ClusterSpec:
    """The options of `up`. Counts are nodes or GPUs; 0 means none."""

    name: str = "demo"
    pretend_gpus: int = 0
    control_plane_only: bool = False
    addons: frozenset[str] = field(default_factory=frozenset)
    kwok: bool = False
    kwok_nodes: int = 0
    audit: bool = False
    nodes: int = 1
    network_policies: bool = False

    @property
    def node_names(self) -> tuple[str, ...]:
        """The names of the real nodes; empty if there is only a control plane."""
        if self.control_plane_only:
            return ()
        first = f"{self.name}-node"
        return (first, *(f"{first}-{number}" for number in range(2, self.nodes + 1)))


def checked(spec: ClusterSpec) -> ClusterSpec:
    """Returns the same spec. Raises LocalClusterError with the option, its value and the remedy."""
    if not _NAME.fullmatch(spec.name):
        raise LocalClusterError(
            f"--name {spec.name!r}: use 1 to 30 lower-case letters, digits and dashes, a letter first"
        )
    unknown = sorted(spec.addons - set(ADDONS))
    if unknown:
        raise LocalClusterError(f"--addons {','.join(unknown)}: unknown; choose from {', '.join(ADDONS)}")
    for option, value in (("--pretend-gpus", spec.pretend_gpus), ("--kwok", spec.kwok_nodes)):
        if not 0 <= value <= 1000:
            raise LocalClusterError(f"{option} {value}: use a number from 0 to 1000")
    if not 1 <= spec.nodes <= MOST_NODES:
        raise LocalClusterError(f"--nodes {spec.nodes}: use a number from 1 to {MOST_NODES}")
    if spec.nodes > 1 and spec.control_plane_only:
        raise LocalClusterError(f"--nodes {spec.nodes}: --control-plane-only has no nodes; drop one of the two")
    if spec.network_policies and spec.control_plane_only:
        raise LocalClusterError(
            "--network-policies: --control-plane-only has no node whose network could enforce them; drop one of the two"
        )
    if spec.pretend_gpus and spec.control_plane_only and not spec.kwok:
        raise LocalClusterError(
            f"--pretend-gpus {spec.pretend_gpus}: --control-plane-only has no node to put GPUs on; "
            "drop one of the two, or add --kwok N for simulated nodes"
        )
    return spec


def covers(running: ClusterSpec, requested: ClusterSpec) -> bool:
    """Whether a running cluster already has everything that the requested one would have."""
    return (
        running.name == requested.name
        and running.control_plane_only == requested.control_plane_only
        and running.pretend_gpus == requested.pretend_gpus
        and running.nodes == requested.nodes
        and running.addons >= requested.addons
        and (running.kwok or not requested.kwok)
        and running.kwok_nodes >= requested.kwok_nodes
        and (running.audit or not requested.audit)
        and running.network_policies == requested.network_policies
    )
