"""Enforces NetworkPolicies on a node, by the controller of kube-router (policies/main.go).

Its rules are in the tables of the older iptables. kube-router replaces the whole table of filters,
and so would undo what kube-proxy, which uses the newer one, changes at the same time.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from localcluster import sandbox
from localcluster.components import Component, Layout
from localcluster.errors import LocalClusterError
from localcluster.paths import ClusterPaths

NAME = "policies"
_PROGRAMS = "/usr/sbin:/usr/bin:/sbin:/bin"
_LEGACY = Path("/usr/sbin/xtables-legacy-multi")
_COMMANDS = ("iptables", "iptables-save", "iptables-restore")
_BRIDGES = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


def check_kernel() -> None:
    """Raises LocalClusterError if packets between pods of one node would pass no filter."""
    if not _BRIDGES.exists():
        subprocess.run(["modprobe", "br_netfilter"], capture_output=True, check=False)
    if not _BRIDGES.exists():
        raise LocalClusterError(
            "--network-policies: this kernel filters nothing on bridges, by which the pods of a node are connected; "
            "load the module br_netfilter, or drop the option"
        )


def component(layout: Layout, program: Path, kubeconfig: Path) -> Component:
    """Returns the process that keeps the rules of the layout's node as the policies say. Pure."""
    return Component(
        NAME,
        (
            str(program),
            f"--kubeconfig={kubeconfig}",
            f"--node={layout.node_name}",
            f"--services={layout.network.service_cidr}",
            f"--ready={_ready(layout.paths)}",
            "--v=1",  # logs each sync of the rules, and how long it took
        ),
        (("PATH", f"{_commands(layout.paths)}:{_PROGRAMS}"),),
    )


def start(layout: Layout, program: Path, kubeconfig: Path) -> None:
    """Starts the enforcement; it doesn't wait until the rules are in place.

    `kubeconfig` may list the pods, namespaces and NetworkPolicies of the cluster.
    """
    _ready(layout.paths).unlink(missing_ok=True)
    folder = _commands(layout.paths)
    folder.mkdir(exist_ok=True)
    for name in _COMMANDS:
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(_LEGACY)
    sandbox.launch(layout.paths, component(layout, program, kubeconfig))


def is_ready(paths: ClusterPaths) -> bool:
    """Whether the rules of the node with these folders have been put in place."""
    return _ready(paths).exists()


def _ready(paths: ClusterPaths) -> Path:
    return paths.etc / "policies-enforced"


def _commands(paths: ClusterPaths) -> Path:
    return paths.etc / "iptables"
