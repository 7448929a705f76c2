"""Builds the command line of every process of a cluster. Pure; it starts nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from localcluster import configs
from localcluster import dns as dns_server
from localcluster import mlflow as mlflow_server
from localcluster.network import Network
from localcluster.paths import PACKAGE, ClusterPaths
from localcluster.spec import S3, S3_REGION, ClusterSpec

MLFLOW_PORT = 5000


@dataclass(frozen=True)
class Component:
    """A process that init keeps running; its output goes to logs/NAME.log."""

    name: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Layout:
    """What every command line is built from: the cluster's options, folders and addresses."""

    spec: ClusterSpec
    paths: ClusterPaths
    network: Network

    @property
    def server(self) -> str:
        """The URL of the API server."""
        return f"https://{self.network.server_address}:6443"

    @property
    def node_name(self) -> str:
        """The name of this layout's node."""
        return self.spec.node_names[self.network.node - 1]

    @property
    def cgroup(self) -> str:
        """The name of this node's parent cgroup of pods; no cluster's name has a dot."""
        return self.spec.name if self.network.node == 1 else f"{self.spec.name}.{self.network.node}"


def etcd(layout: Layout, program: Path) -> Component:
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    return Component(
        "etcd",
        (
            str(program),
            f"--data-dir={layout.paths.data / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ),
    )


def apiserver(layout: Layout, program: Path) -> Component:
    pki, address = layout.paths.pki, layout.network.node_address
    audit = (
        f"--audit-policy-file={layout.paths.etc / 'audit-policy.yaml'}",
        f"--audit-log-path={layout.paths.audit_log}",
        "--audit-log-mode=blocking",
        "--audit-log-maxsize=4096",
    )
    return Component(
        "kube-apiserver",
        (
            str(program),
            f"--advertise-address={address}",
            "--bind-address=0.0.0.0",
            "--secure-port=6443",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--service-cluster-ip-range={layout.network.service_cidr}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--client-ca-file={pki / 'ca.crt'}",
            f"--tls-cert-file={pki / 'apiserver.crt'}",
            f"--tls-private-key-file={pki / 'apiserver.key'}",
            f"--kubelet-certificate-authority={pki / 'ca.crt'}",
            f"--kubelet-client-certificate={pki / 'apiserver-kubelet.crt'}",
            f"--kubelet-client-key={pki / 'apiserver-kubelet.key'}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={pki / 'ca.crt'}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            f"--proxy-client-cert-file={pki / 'front-proxy.crt'}",
            f"--proxy-client-key-file={pki / 'front-proxy.key'}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={pki / 'service-accounts.pub'}",
            f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
            "--shutdown-delay-duration=0s",
            *(audit if layout.spec.audit else ()),
        ),
    )


def controller_manager(layout: Layout, program: Path) -> Component:
    pki, config = layout.paths.pki, layout.paths.etc / "controller-manager.kubeconfig"
    return Component(
        "kube-controller-manager",
        (
            str(program),
            f"--kubeconfig={config}",
            f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            f"--root-ca-file={pki / 'ca.crt'}",
            f"--service-account-private-key-file={pki / 'service-accounts.key'}",
            f"--cluster-signing-cert-file={pki / 'ca.crt'}",
            f"--cluster-signing-key-file={pki / 'ca.key'}",
            "--node-monitor-grace-period=40s",
            "--pvclaimbinder-sync-period=3s",
            "--kube-api-qps=300",
            "--kube-api-burst=500",
        ),
    )


def scheduler(layout: Layout, program: Path) -> Component:
    config = layout.paths.etc / "scheduler.kubeconfig"
    return Component(
        "kube-scheduler",
        (
            str(program),
            f"--kubeconfig={config}",
            f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--kube-api-qps=300",
            "--kube-api-burst=500",
        ),
    )


def containerd(layout: Layout, config: str) -> Component:
    return Component("containerd", ("containerd", f"--config={layout.paths.etc / config}"))


def kubelet(layout: Layout, program: Path) -> Component:
    return Component(
        "kubelet",
        (
            str(program),
            f"--config={layout.paths.etc / 'kubelet.yaml'}",
            f"--kubeconfig={layout.paths.etc / 'node.kubeconfig'}",
            f"--hostname-override={layout.node_name}",
            f"--node-ip={layout.network.node_address}",
            "--root-dir=/var/lib/kubelet",
        ),
    )


def kube_proxy(layout: Layout, program: Path) -> Component:
    return Component("kube-proxy", (str(program), f"--config={layout.paths.etc / 'kube-proxy.yaml'}"))


def dns(layout: Layout) -> Component:
    """Answers pods' queries from the hosts file that `dns_records` writes; it has no upstream."""
    return Component(
        "dns",
        (
            "/usr/sbin/dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--log-facility=-",
            "--user=root",
            "--pid-file",
            "--bind-interfaces",
            f"--listen-address={layout.network.node_address}",
            "--except-interface=lo",
            "--no-resolv",
            "--no-hosts",
            f"--hostsdir={layout.paths.hosts}",
            f"--local=/{configs.DOMAIN}/",
            f"--local-ttl={dns_server.TTL_SECONDS}",
        ),
    )


def dns_records(layout: Layout) -> Component:
    """Watches Services and their endpoints, and writes dnsmasq's hosts file."""
    command = (sys.executable, "-m", "localcluster.dns", layout.server, str(layout.paths.pki), str(layout.paths.hosts))
    return Component("dns-records", command)


def kwok(layout: Layout, program: Path) -> Component:
    """Simulates the nodes that carry the kwok annotation, and the pods on them."""
    return Component(
        "kwok",
        (
            str(program),
            f"--config={PACKAGE / 'kwok-stages.yaml'}",
            f"--kubeconfig={layout.paths.etc / 'admin.kubeconfig'}",
            "--manage-all-nodes=false",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            f"--cidr={layout.network.kwok_pod_cidr}",
            f"--node-ip={layout.network.node_address}",
            "--node-lease-duration-seconds=40",
        ),
    )


def s3(layout: Layout, program: Path, access: S3, has_xattrs: bool) -> Component:
    folder = layout.paths.data / "s3"
    metadata = () if has_xattrs else ("--sidecar", str(layout.paths.data / "s3-metadata"))
    return Component(
        "s3",
        (
            str(program),
            *("--port", f"{layout.network.node_address}:9000"),
            *("--region", S3_REGION),
            "--quiet",
            "posix",
            *metadata,
            str(folder),
        ),
        (("ROOT_ACCESS_KEY", access.access_key_id), ("ROOT_SECRET_KEY", access.secret_access_key)),
    )


def discovery(layout: Layout) -> Component:
    """Watches pods and writes the scrape targets of Prometheus."""
    return Component(
        "discovery",
        (
            sys.executable,
            "-m",
            "localcluster.discovery",
            layout.server,
            str(layout.paths.pki),
            str(layout.paths.targets),
        ),
    )


def prometheus(layout: Layout) -> Component:
    return Component(
        "prometheus",
        (
            "prometheus",
            f"--config.file={layout.paths.etc / 'prometheus.yaml'}",
            f"--storage.tsdb.path={layout.paths.data / 'prometheus'}",
            "--storage.tsdb.retention.time=1d",
            f"--web.listen-address={layout.network.node_address}:9090",
            "--web.enable-lifecycle",
        ),
    )


def mlflow(layout: Layout, programs: Path) -> Component:
    """Accepts requests to its address and to the host `mlflow`.

    Pods use the latter if their namespace has a Service of that name.
    """
    command = mlflow_server.command(
        programs, layout.paths.data / "mlflow", layout.network.node_address, MLFLOW_PORT, ("mlflow",)
    )
    return Component("mlflow", command, mlflow_server.ENVIRONMENT)
