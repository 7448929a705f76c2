"""Builds the configuration files that components read, as text. Pure."""

from __future__ import annotations

import json
from pathlib import Path

from localcluster.network import Network
from localcluster.paths import ClusterPaths

DOMAIN = "cluster.local"
CNI_PLUGINS = "/usr/lib/cni"


def containerd(paths: ClusterPaths, pause_image: str) -> str:
    """Returns containerd's configuration, in TOML.

    It sets `restrict_oom_score_adj`, since runc fails if it has to lower a container's OOM score
    without CAP_SYS_RESOURCE.
    """
    return f"""\
version = 2
root = "{paths.containerd}"
state = "/run/containerd/state"
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause_image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  tolerate_missing_hugetlb_controller = true
  max_container_log_line_size = 262144
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = false
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "{paths.etc / "registries"}"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{CNI_PLUGINS}"
  conf_dir = "{paths.etc / "cni"}"
"""


def cni(network: Network) -> str:
    return json.dumps(
        {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "pods",
                    "isGateway": True,
                    "hairpinMode": True,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": network.pod_cidr}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }
    )


def kubelet(paths: ClusterPaths, network: Network, cgroup_root: str) -> str:
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": network.node_address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(paths.pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(paths.pki / "kubelet.crt"),
            "tlsPrivateKeyFile": str(paths.pki / "kubelet.key"),
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": cgroup_root,
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDomain": DOMAIN,
            "clusterDNS": [network.server_address],
            "resolvConf": "",
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "kubeAPIQPS": 100,
            "kubeAPIBurst": 200,
            "registryPullQPS": 0,
            "nodeStatusUpdateFrequency": "5s",
            "syncFrequency": "10s",
            "shutdownGracePeriod": "0s",
        }
    )


def kube_proxy(paths: ClusterPaths, network: Network, node_name: str) -> str:
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "hostnameOverride": node_name,
            "bindAddress": network.node_address,
            "clusterCIDR": network.pods,
            "clientConnection": {"kubeconfig": str(paths.etc / "proxy.kubeconfig")},
            "conntrack": {"maxPerCore": 0},
            "iptables": {"minSyncPeriod": "100ms"},
        }
    )


def audit_policy() -> str:
    return json.dumps(
        {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived", "ResponseStarted"],
            "rules": [{"level": "Metadata"}],
        }
    )


def prometheus(targets: Path) -> str:
    """Returns Prometheus's configuration, in JSON, which is valid YAML.

    It scrapes what discovery writes into `targets` and preserves the metrics' own labels.
    """
    return json.dumps(
        {
            "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "5s"},
            "scrape_configs": [
                {
                    "job_name": "finetune-operator-pods",
                    "honor_labels": True,
                    "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "5s"}],
                }
            ],
        },
        indent=1,
    )
