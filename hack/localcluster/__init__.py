"""A real Kubernetes on this machine without Docker, for the demo and the tests.

Called by `python3 -m localcluster` and by tests as `localcluster.up(...)`. It runs before any virtual
environment exists, so it imports nothing but the standard library. Each cluster lives in its own process,
mount and network namespaces: it never changes the host's firewall, sysctls or mounts.
"""

from localcluster.cluster import Cluster, up
from localcluster.errors import LocalClusterError
from localcluster.spec import S3, ClusterSpec

__all__ = ["S3", "Cluster", "ClusterSpec", "LocalClusterError", "up"]
