"""The steps of `up`, in order. Each step may be interrupted at any point."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from localcluster import components, configs, dns, enforcement, mlflow, node, packages, sandbox, workers
from localcluster.api import Api, http_ok
from localcluster.builds import tool
from localcluster.components import Layout
from localcluster.errors import LocalClusterError
from localcluster.locks import exclusive
from localcluster.network import network_for
from localcluster.paths import ClusterPaths
from localcluster.pki import identities, kubeconfig, make_pki, node_identities, sign
from localcluster.spec import BUCKETS, S3, ClusterSpec

_GIB = 1 << 30
_KUBECONFIGS = ("admin", "controller-manager", "scheduler", "proxy", "node")


def check_host(spec: ClusterSpec, paths: ClusterPaths) -> None:
    """Raises LocalClusterError, before anything is started, if the cluster can't run here."""
    if os.geteuid() != 0:
        raise LocalClusterError(
            f"up needs root (user id is {os.geteuid()}): it makes network and mount namespaces; "
            "run it with sudo, or use kind if Docker runs here"
        )
    for hidden in ("/run", "/var/lib", "/var/log"):
        if paths.root.is_relative_to(hidden):
            raise LocalClusterError(
                f"cache folder {paths.root}: the cluster hides {hidden}; set FINETUNE_CACHE to another folder"
            )
    required = packages.CONTROL_PLANE | ({} if spec.control_plane_only else packages.NODE)
    if spec.network_policies:
        required |= packages.POLICIES
    packages.ensure(required | (packages.PROMETHEUS if "prometheus" in spec.addons else {}))
    if spec.network_policies:
        enforcement.check_kernel()
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalClusterError(
            f"cache folder {paths.root}: {error.strerror}; set FINETUNE_CACHE to a writable folder"
        ) from error
    need = 1 if spec.control_plane_only else 3
    free = shutil.disk_usage(paths.root).free / _GIB
    if free < need:
        raise LocalClusterError(
            f"cluster {spec.name!r} needs {need} GiB of disk, but {paths.root} has {free:.1f} GiB free; "
            "free some space, or set FINETUNE_CACHE to a folder on a larger disk"
        )


def build_tools(spec: ClusterSpec) -> dict[str, Path]:
    """Returns the programs that this spec needs, by name, built if the cache lacks them."""
    kube = tool("kube").parent
    tools = {link.name: link for link in kube.iterdir()}
    if not spec.control_plane_only:
        tools["pause"] = tool("pause")
    if spec.network_policies:
        tools["policies"] = tool("policies")
    if "s3" in spec.addons:
        tools["versitygw"] = tool("versitygw")
    if spec.kwok:
        tools["kwok"] = tool("kwok")
    if "mlflow" in spec.addons:
        tools["mlflow"] = mlflow.programs()
    return tools


def start_control_plane(spec: ClusterSpec, paths: ClusterPaths, tools: dict[str, Path]) -> Layout:
    """Creates namespaces and certificates, and starts etcd and the API server.

    It doesn't wait until they respond; `finish_control_plane` does.
    """
    shutil.rmtree(paths.logs, ignore_errors=True)
    paths.logs.mkdir(parents=True)
    with exclusive(paths.root.parent / ".network.lock", "another cluster to choose its network"):
        network = network_for(spec.name, sandbox.routes_in_use())
        sandbox.start(paths, network)
    layout = Layout(spec, paths, network)
    sandbox.launch(paths, components.etcd(layout, tools["etcd"]))
    make_pki(paths.pki, identities(network.server_address, network.kubernetes_service))
    if spec.node_names:
        sign(paths.pki, node_identities(layout.node_name, network.node_address))
    for identity in _KUBECONFIGS if spec.node_names else _KUBECONFIGS[:-1]:
        text = kubeconfig(paths.pki, identity, layout.server, f"localcluster-{spec.name}")
        (paths.etc / f"{identity}.kubeconfig").write_text(text)
    if spec.audit:
        (paths.etc / "audit-policy.yaml").write_text(configs.audit_policy())
    shutil.copy(paths.etc / "admin.kubeconfig", paths.kubeconfig)
    sandbox.launch(paths, components.apiserver(layout, tools["kube-apiserver"]))
    return layout


def finish_control_plane(layout: Layout, tools: dict[str, Path]) -> None:
    """Waits for the API server, then starts the controller manager and the scheduler."""
    api = api_of(layout)
    wait(lambda: api.answers("/readyz"), "kube-apiserver", layout.paths)
    sandbox.launch(layout.paths, components.controller_manager(layout, tools["kube-controller-manager"]))
    sandbox.launch(layout.paths, components.scheduler(layout, tools["kube-scheduler"]))
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    wait(lambda: api.answers(account), "kube-controller-manager", layout.paths)


def start_addons(layout: Layout, tools: dict[str, Path]) -> S3 | None:
    """Starts object storage, Prometheus and MLflow, none of which needs Kubernetes to start.

    Returns the access to object storage, None if it isn't among the add-ons.
    """
    paths, addons = layout.paths, layout.spec.addons
    access = None
    if "s3" in addons:
        access = S3(f"http://{layout.network.node_address}:9000", "localcluster", secrets.token_hex(16))
        for bucket in BUCKETS:
            (paths.data / "s3" / bucket).mkdir(parents=True, exist_ok=True)
        (paths.data / "s3-metadata").mkdir(exist_ok=True)
        sandbox.launch(paths, components.s3(layout, tools["versitygw"], access, has_xattrs(paths.data)))
    if "prometheus" in addons:
        (paths.etc / "prometheus.yaml").write_text(configs.prometheus(paths.targets))
        sandbox.launch(paths, components.discovery(layout))
        sandbox.launch(paths, components.prometheus(layout))
    if "mlflow" in addons:
        (paths.data / "mlflow").mkdir(exist_ok=True)
        sandbox.launch(paths, components.mlflow(layout, tools["mlflow"]))
    return access


def wait_for_addons(layout: Layout) -> None:
    """Waits until every add-on of the spec responds."""
    address = layout.network.node_address
    if "s3" in layout.spec.addons:
        wait(lambda: http_ok(f"http://{address}:9000/"), "s3", layout.paths)
    if "prometheus" in layout.spec.addons:
        wait(lambda: http_ok(f"http://{address}:9090/-/ready"), "prometheus", layout.paths)
    if "mlflow" in layout.spec.addons:
        health = f"http://{address}:{components.MLFLOW_PORT}/health"
        wait(lambda: http_ok(health), "mlflow", layout.paths, seconds=180)


def bring_up(spec: ClusterSpec, paths: ClusterPaths) -> tuple[Layout, S3 | None]:
    """Brings the cluster up to the point where pods run."""
    tools = build_tools(spec)
    layout = start_control_plane(spec, paths, tools)
    with ThreadPoolExecutor() as pool:
        runtime = None if spec.control_plane_only else pool.submit(node.start_runtime, layout, tools["pause"])
        access = start_addons(layout, tools)
        finish_control_plane(layout, tools)
        if runtime is not None:
            runtime.result()
            node.start_node(layout, tools)
            node.start_dns(layout)
            if spec.network_policies:
                enforcement.start(layout, tools["policies"], paths.etc / "admin.kubeconfig")
            list(pool.map(lambda number: workers.start(layout, number, tools), range(2, spec.nodes + 1)))
    api = api_of(layout)
    if spec.kwok:
        sandbox.launch(paths, components.kwok(layout, tools["kwok"]))
        for number in range(spec.kwok_nodes):
            api.request("POST", "/api/v1/nodes", node.kwok_node(spec, number))
        kwok_nodes = [f"/api/v1/nodes/{node.kwok_name(number)}" for number in range(spec.kwok_nodes)]
        wait(lambda: all(node.is_ready(api, path) for path in kwok_nodes), "kwok", paths)
    if not spec.control_plane_only:
        for name in spec.node_names:
            wait(partial(node.is_ready, api, f"/api/v1/nodes/{name}"), "kubelet", paths)
        if spec.network_policies:
            for folders in (paths, *(paths.node(number) for number in range(2, spec.nodes + 1))):
                wait(partial(enforcement.is_ready, folders), enforcement.NAME, folders)
        wait(lambda: dns.is_ready(paths.hosts, layout.network.node_address), "dns", paths)
        if spec.pretend_gpus:
            for name in spec.node_names:
                node.pretend_gpus(api, name, spec.pretend_gpus)
    wait_for_addons(layout)
    return layout, access


def api_of(layout: Layout) -> Api:
    """Returns a client of this cluster's API server."""
    return Api(layout.server, layout.paths.pki)


def wait(done: Callable[[], bool], component: str, paths: ClusterPaths, seconds: float = 240) -> None:
    """Polls until `done`.

    On time-out, raises LocalClusterError with the last lines of the component's log.
    """
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            log = paths.logs / f"{component}.log"
            lines = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else ["no output"]
            raise LocalClusterError(
                f"{component} is not ready after {seconds:.0f} s; the end of its log ({log}):\n" + "\n".join(lines)
            )
        time.sleep(0.1)


def has_xattrs(folder: Path) -> bool:
    """Whether this file system supports user attributes, in which the S3 server stores metadata."""
    try:
        os.setxattr(folder, "user.localcluster", b"1")
        os.removexattr(folder, "user.localcluster")
    except OSError:
        return False
    return True
