"""The one real node (containerd, kubelet, kube-proxy, DNS) and pretended ones. Called by bringup."""

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
    """containerd, without what a former run of this cluster left but with the images that it loaded."""
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
    """Before the CRI plugin looks: a container without its process would haunt the kubelet."""
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
    paths, network, name = layout.paths, layout.network, layout.spec.name
    sandbox.make_cgroups(name)
    cgroup_root = f"/{sandbox.cgroup_name(name)}"
    (paths.etc / "kubelet.yaml").write_text(configs.kubelet(paths, network, cgroup_root))
    (paths.etc / "kube-proxy.yaml").write_text(configs.kube_proxy(paths, network, layout.spec.node_name))
    (paths.etc / "Corefile").write_text(configs.corefile(paths, network))
    sandbox.launch(paths, components.kubelet(layout, tools["kubelet"]))
    sandbox.launch(paths, components.kube_proxy(layout, tools["kube-proxy"]))
    sandbox.launch(paths, components.coredns(layout, tools["coredns"]))


def is_ready(api: Api, path: str) -> bool:
    try:
        status = api.get(path).get("status", {})
    except ApiError:
        return False
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))


def pretend_gpus(api: Api, node_name: str, count: int) -> None:
    """Tells the scheduler of GPUs that aren't there; the kubelet keeps what it does not know."""
    patch = [
        {"op": "add", "path": f"/status/{where}/nvidia.com~1gpu", "value": str(count)}
        for where in ("capacity", "allocatable")
    ]
    api.request("PATCH", f"/api/v1/nodes/{node_name}/status", patch, "application/json-patch+json")


def kwok_name(number: int) -> str:
    return f"kwok-{number}"


def kwok_node(spec: Any, number: int) -> dict[str, Any]:
    """A pretended node; tainted where a real node is there, so that only pods that ask for it land on it."""
    name = kwok_name(number)
    taint = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
    room = {"cpu": "64", "memory": "512Gi", "pods": "500"}
    if spec.pretend_gpus:
        room["nvidia.com/gpu"] = str(spec.pretend_gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "type": "kwok"},
        },
        "spec": {"taints": [] if spec.control_plane_only else [taint]},
        "status": {"capacity": room, "allocatable": room},
    }
