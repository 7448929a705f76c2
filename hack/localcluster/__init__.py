"""Runs a real Kubernetes cluster on this machine without Docker, for the demo and the tests.

It runs before any virtual environment exists, so it imports only the standard library. Each
cluster has its own process, mount and network namespaces: it never changes the host's firewall,
sysctls or mounts.
"""

from localcluster.cluster import Cluster, up
from localcluster.errors import LocalClusterError
from localcluster.spec import S3, ClusterSpec

__all__ = ["S3", "Cluster", "ClusterSpec", "LocalClusterError", "up"]
