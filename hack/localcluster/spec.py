"""What a caller asks for and what it gets back, as frozen values. Used by every module; does no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from localcluster.errors import LocalClusterError

ADDONS = ("s3", "prometheus", "mlflow")
BUCKETS = ("models", "data", "outputs")
S3_REGION = "us-east-1"
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?")


@dataclass(frozen=True)
class S3:
    """Where the add-on object store answers, from the host and from pods alike."""

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

    @property
    def node_name(self) -> str:
        return f"{self.name}-node"


def checked(spec: ClusterSpec) -> ClusterSpec:
    """The same spec, or a LocalClusterError that names the option, its value and the remedy."""
    if not _NAME.fullmatch(spec.name):
        raise LocalClusterError(
            f"--name {spec.name!r}: use 1 to 30 lower-case letters, digits and dashes, a letter first"
        )
    unknown = sorted(spec.addons - set(ADDONS))
    if unknown:
        raise LocalClusterError(f"--addons {','.join(unknown)}: unknown; choose from {', '.join(ADDONS)}")
    for option, value in (("--pretend-gpus", spec.pretend_gpus), ("--kwok", spec.kwok_nodes)):
        if not 0 <= value <= 1000:
            raise LocalClusterError(f"{option} {value}: give a number from 0 to 1000")
    if spec.pretend_gpus and spec.control_plane_only and not spec.kwok:
        raise LocalClusterError(
            f"--pretend-gpus {spec.pretend_gpus}: --control-plane-only has no node to put GPUs on; "
            "drop one of the two, or add --kwok N for pretended nodes"
        )
    return spec


def covers(running: ClusterSpec, asked: ClusterSpec) -> bool:
    """Whether a running cluster already gives all that is asked."""
    return (
        running.name == asked.name
        and running.control_plane_only == asked.control_plane_only
        and running.pretend_gpus == asked.pretend_gpus
        and running.addons >= asked.addons
        and (running.kwok or not asked.kwok)
        and running.kwok_nodes >= asked.kwok_nodes
        and (running.audit or not asked.audit)
    )
