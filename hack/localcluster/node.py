"""Starts a real node (containerd, kubelet, kube-proxy, DNS) and describes simulated ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from localcluster import components, configs, sandbox
from localcluster.api import Api, ApiError
from localcluster.components import Layout
from localcluster.errors import LocalClusterError
from localcluster.images import Containerd, import_pause, pause_image


def start_runtime(layout: Layout, pause: Path) -> None:
    """Starts containerd with the images, but without the containers, of earlier runs."""
    paths = layout.paths
    image = pause_image(pause)
    (paths.etc / "containerd.toml").write_text(configs.containerd(paths, image))
    (paths.etc / "cni").mkdir(exist_ok=True)
    (paths.etc / "cni" / "10-pods.conflist").write_text(configs.cni(layout.network))
    _drop_old_containers(layout, image)
    sandbox.launch(paths, components.containerd(layout, "containerd.toml"))
    runtime = Containerd.of(paths)
    _wait_for(runtime, layout)
    import_pause(runtime, pause)


def _drop_old_containers(layout: Layout, image: str) -> None:
    """Deletes leftover containers with the CRI plugin off.

    The kubelet would otherwise try to handle containers whose process is gone.
    """
    paths = layout.paths
    if not paths.containerd.exists():
        return
    text = configs.containerd(paths, image).replace(
        "disabled_plugins = [", 'disabled_plugins = [\n  "io.containerd.grpc.v1.cri",'
    )
    (paths.etc / "containerd-clean.toml").write_text(text)
    sandbox.launch(paths, components.containerd(layout, "containerd-clean.toml"))
    runtime = Containerd.of(paths)
    _wait_for(runtime, layout)
    if leftovers := runtime.ctr("containers", "list", "--quiet").split():
        runtime.ctr("containers", "delete", *leftovers)
    sandbox.stop(paths, "containerd")


def _wait_for(runtime: Containerd, layout: Layout) -> None:
    deadline = time.monotonic() + 30
    while not runtime.answers():
        if time.monotonic() > deadline:
            raise LocalClusterError(f"containerd does not answer after 30 s; see {layout.paths.logs}")
        time.sleep(0.1)


def start_node(layout: Layout, tools: dict[str, Path]) -> None:
    """Starts kubelet and kube-proxy; it doesn't wait until the node is ready."""
    paths, network = layout.paths, layout.network
    sandbox.make_cgroups(layout.cgroup)
    cgroup_root = f"/{sandbox.cgroup_name(layout.cgroup)}"
    (paths.etc / "kubelet.yaml").write_text(configs.kubelet(paths, network, cgroup_root))
    (paths.etc / "kube-proxy.yaml").write_text(configs.kube_proxy(paths, network, layout.node_name))
    sandbox.launch(paths, components.kubelet(layout, tools["kubelet"]))
    sandbox.launch(paths, components.kube_proxy(layout, tools["kube-proxy"]))


def start_dns(layout: Layout) -> None:
    """Starts the cluster's DNS, on its first node."""
    paths = layout.paths
    paths.hosts.mkdir(exist_ok=True)
    (paths.hosts / "services").unlink(missing_ok=True)
    sandbox.launch(paths, components.dns(layout))
    sandbox.launch(paths, components.dns_records(layout))


def is_ready(api: Api, path: str) -> bool:
    """Whether the node at the API path `path` is Ready."""
    try:
        status = api.get(path).get("status", {})
    except ApiError:
        return False
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))


def pretend_gpus(api: Api, node_name: str, count: int) -> None:
    """Adds GPUs that don't exist to the node's status; the kubelet doesn't remove them."""
    patch = [
        {"op": "add", "path": f"/status/{field}/nvidia.com~1gpu", "value": str(count)}
        for field in ("capacity", "allocatable")
    ]
    api.request("PATCH", f"/api/v1/nodes/{node_name}/status", patch, "application/json-patch+json")


def kwok_name(number: int) -> str:
    return f"kwok-{number}"


def kwok_node(spec: Any, number: int) -> dict[str, Any]:
    """Returns the manifest of a simulated node.

    If the cluster has a real node, the simulated one is tainted, so that it runs only pods that
    tolerate it.
    """
    name = kwok_name(number)
    taint = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
    resources = {"cpu": "64", "memory": "512Gi", "ephemeral-storage": "100Ti", "pods": "500"}
    if spec.pretend_gpus:
        resources["nvidia.com/gpu"] = str(spec.pretend_gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "type": "kwok"},
        },
        "spec": {"taints": [] if spec.control_plane_only else [taint]},
        "status": {"capacity": resources, "allocatable": resources},
    }
