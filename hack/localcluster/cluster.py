"""The public interface: `up`, and the `Cluster` that it returns. It prints only progress."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from localcluster import bringup, node, sandbox, workers
from localcluster.api import Api
from localcluster.bringup import wait
from localcluster.builds import tool
from localcluster.components import MLFLOW_PORT, Layout
from localcluster.errors import LocalClusterError
from localcluster.locks import exclusive
from localcluster.network import Network, host_interface
from localcluster.paths import ClusterPaths, cluster_paths
from localcluster.spec import S3, ClusterSpec, checked, covers

Fault = Literal["cut", "connect", "off", "on"]  # the network of a node, or its power
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Its addresses are reachable both from the host and from pods."""

    spec: ClusterSpec
    server: str
    kubeconfig: Path
    bridge_address: str
    host_address: str
    s3: S3 | None = None
    prometheus_url: str | None = None
    mlflow_url: str | None = None
    audit_log: Path | None = None

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.spec.name

    @property
    def node(self) -> str | None:
        """The name of the first real node, None if there is only a control plane."""
        return next(iter(self.nodes), None)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the real nodes, of which the first runs the cluster's servers, too."""
        return self.spec.node_names

    def down(self) -> None:
        """Stops the cluster and removes it; loaded images stay in the cache."""
        down(self.name)

    def load(self, image: str) -> None:
        """Copies an image into the node's containerd.

        `image` is a name in buildah's storage or the path of an OCI archive.
        """
        from localcluster.loading import load  # only this needs buildah

        load(self.name, image)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Returns kubectl's output. Raises LocalClusterError with its error message."""
        done = subprocess.run(
            [tool("kubectl"), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
        )
        if done.returncode:
            raise LocalClusterError(f"kubectl {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout

    def fault(self, number: int, kind: Fault) -> None:
        """Does something to a further node (`number` 2 or more), without telling Kubernetes.

        Raises LocalClusterError if there is no such node.
        """
        if not 2 <= number <= self.spec.nodes:
            raise LocalClusterError(
                f"node {number}: cluster {self.name!r} has {self.spec.nodes} nodes, and the first can't fail without "
                "the cluster; choose from 2 on, or start the cluster with more --nodes"
            )
        octet = int(self.bridge_address.split(".")[1])
        layout = Layout(self.spec, cluster_paths(self.name), Network(octet, host_interface(self.name)))
        if kind == "on":
            workers.start(layout, number, bringup.build_tools(self.spec))
        elif kind == "off":
            workers.switch_off(layout, number)
        else:
            workers.set_link(layout, number, up=kind == "connect")

    def restart(self, component: str, *, kill: bool = False) -> None:
        """Stops a component (by SIGKILL if `kill`); it is started again one second later."""
        number = signal.SIGKILL if kill else signal.SIGTERM
        sandbox.ask(cluster_paths(self.name), {"op": "restart", "name": component, "signal": int(number)})


def up(
    name: str = "demo",
    *,
    pretend_gpus: int = 0,
    control_plane_only: bool = False,
    addons: Iterable[str] = (),
    kwok: bool = False,
    kwok_nodes: int = 0,
    audit: bool = False,
    nodes: int = 1,
    network_policies: bool = False,
) -> Cluster:
    """Starts the cluster, or returns the running one if it covers all the options.

    Raises LocalClusterError, and leaves nothing behind, if a part fails to start.
    """
    spec = checked(
        ClusterSpec(
            name=name,
            pretend_gpus=pretend_gpus,
            control_plane_only=control_plane_only,
            addons=frozenset(addons),
            kwok=kwok or kwok_nodes > 0,
            kwok_nodes=kwok_nodes,
            audit=audit,
            nodes=nodes,
            network_policies=network_policies,
        )
    )
    paths = cluster_paths(name)
    bringup.check_host(spec, paths)
    with exclusive(paths.lock, f"another up or down of cluster {name!r}"):
        if running := find(name):
            if covers(running.spec, spec):
                return running
            raise LocalClusterError(
                f"cluster {name!r} is up with other options ({_description(running.spec)}); "
                f"run `down --name {name}` first, or choose another --name"
            )
        sandbox.destroy(paths, name)
        try:
            layout, access = bringup.bring_up(spec, paths)
        except BaseException:
            sandbox.destroy(paths, name)
            raise
        cluster = _described(layout, access)
        _save(cluster, paths)
        return cluster


def down(name: str = "demo", *, purge: bool = False) -> None:
    """Stops the cluster and removes everything that it created.

    Loaded images stay in the cache unless `purge`.
    """
    if os.geteuid() != 0:
        raise LocalClusterError(f"down needs root (user id is {os.geteuid()}); run it with sudo")
    spec = checked(ClusterSpec(name=name))
    paths = cluster_paths(spec.name)
    with exclusive(paths.lock, f"another up or down of cluster {name!r}"):
        sandbox.destroy(paths, name)
        sandbox.remove_tree(paths.logs)
        if purge or not paths.containerd.exists():
            sandbox.remove_tree(paths.root)
        paths.lock.unlink(missing_ok=True)


def find(name: str) -> Cluster | None:
    """Returns the running cluster of that name, None if there is none or it is incomplete."""
    paths = cluster_paths(name)
    if sandbox.init_pid(paths.root) is None or not paths.info.exists():
        return None
    return _load(json.loads(paths.info.read_text()))


def get(name: str) -> Cluster:
    """Returns the running cluster of that name. Raises LocalClusterError if there is none."""
    if cluster := find(name):
        return cluster
    raise LocalClusterError(f"cluster {name!r} is not up; run `up --name {name}` first")


def component_states(name: str) -> list[dict[str, Any]]:
    """Lists name, pid (0 if it isn't running), restarts and last exit codes of each component."""
    services: list[dict[str, Any]] = sandbox.ask(cluster_paths(name), {"op": "list"})["services"]
    return services


def restore_gpus(cluster: Cluster) -> None:
    """Adds the simulated GPUs again after the kubelet restarted, which drops them."""
    if not cluster.node or not cluster.spec.pretend_gpus:
        return
    paths = cluster_paths(cluster.name)
    api = Api(cluster.server, paths.pki)
    for name in cluster.nodes:
        wait(partial(node.is_ready, api, f"/api/v1/nodes/{name}"), "kubelet", paths)
        node.pretend_gpus(api, name, cluster.spec.pretend_gpus)


def _described(layout: Layout, access: S3 | None) -> Cluster:
    spec, paths, address = layout.spec, layout.paths, layout.network.node_address
    return Cluster(
        spec=spec,
        server=layout.server,
        kubeconfig=paths.kubeconfig,
        bridge_address=address,
        host_address=layout.network.host_address,
        s3=access,
        prometheus_url=f"http://{address}:9090" if "prometheus" in spec.addons else None,
        mlflow_url=f"http://{address}:{MLFLOW_PORT}" if "mlflow" in spec.addons else None,
        audit_log=paths.audit_log if spec.audit else None,
    )


def _save(cluster: Cluster, paths: ClusterPaths) -> None:
    """Writes the cluster's file, last and atomically: a cluster without this file is not up."""
    document = asdict(cluster)
    document["spec"]["addons"] = sorted(cluster.spec.addons)
    draft = paths.info.with_suffix(".tmp")
    draft.write_text(json.dumps(document, default=str))
    draft.rename(paths.info)


def _load(document: dict[str, Any]) -> Cluster:
    spec = document["spec"]
    return Cluster(
        spec=ClusterSpec(**{**spec, "addons": frozenset(spec["addons"])}),
        server=document["server"],
        kubeconfig=Path(document["kubeconfig"]),
        bridge_address=document["bridge_address"],
        host_address=document["host_address"],
        s3=S3(**document["s3"]) if document["s3"] else None,
        prometheus_url=document["prometheus_url"],
        mlflow_url=document.get("mlflow_url"),
        audit_log=Path(document["audit_log"]) if document["audit_log"] else None,
    )


def _description(spec: ClusterSpec) -> str:
    parts = [f"addons: {','.join(sorted(spec.addons)) or 'none'}", f"simulated GPUs: {spec.pretend_gpus}"]
    parts += ["control plane only"] if spec.control_plane_only else [f"real nodes: {spec.nodes}"]
    parts += [f"kwok nodes: {spec.kwok_nodes}"] if spec.kwok else []
    parts += ["NetworkPolicies enforced"] if spec.network_policies else []
    return "; ".join([*parts, "audit log"] if spec.audit else parts)
