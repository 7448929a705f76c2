"""Runs the demo's cluster on kind, if a Docker engine responds.

kind-config.yaml describes the nodes. S3, Prometheus and MLflow are processes on this machine. S3
and MLflow listen on the Docker network's gateway, so that pods reach them; Prometheus scrapes pods
through the API server's proxy.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from demo.clusters import ROOT, ClusterAccess, tool

S3_PORT = 7480
PROMETHEUS_PORT = 9480
MLFLOW_PORT = 5480
BUCKETS = ("models", "data", "outputs")


def _state(name: str) -> Path:
    cache = os.environ.get("FINETUNE_CACHE") or os.path.expanduser("~/.cache/finetune-operator")
    return Path(cache) / "kind" / name


def _run(*command: str) -> str:
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def up(name: str, *, mlflow: bool = False) -> ClusterAccess:
    """Creates the cluster and starts S3, Prometheus and, if requested, MLflow.

    What already exists or runs is left as it is. Raises RuntimeError if a part fails.
    """
    state = _state(name)
    state.mkdir(parents=True, exist_ok=True)
    kubeconfig = state / "kubeconfig"
    if name not in _run("kind", "get", "clusters").split():
        config = str(ROOT / "kind-config.yaml")
        _run(
            "kind",
            "create",
            "cluster",
            "--name",
            name,
            "--config",
            config,
            "--kubeconfig",
            str(kubeconfig),
            "--wait",
            "120s",
        )
    kubectl = shutil.which("kubectl") or tool("localcluster", "tool", "kubectl")
    networks = json.loads(_run("docker", "network", "inspect", "kind"))[0]["IPAM"]["Config"]
    gateway = next(entry["Gateway"] for entry in networks if "." in entry.get("Gateway", ""))
    cluster = ClusterAccess(
        name=name,
        kubeconfig=str(kubeconfig),
        kubectl=kubectl,
        helm=shutil.which("helm") or tool("localcluster", "tool", "helm"),
        s3_endpoint=f"http://{gateway}:{S3_PORT}",
        s3_access_key="finetune",
        s3_secret_key=_secret(state),
        s3_region="us-east-1",
        prometheus_url=f"http://127.0.0.1:{PROMETHEUS_PORT}",
        mlflow_url=f"http://{gateway}:{MLFLOW_PORT}" if mlflow else "",
    )
    _start_s3(state, cluster, gateway)
    _start_prometheus(state, cluster)
    if mlflow:
        _start_mlflow(state, cluster, gateway)
    return cluster


def load(name: str, *images: str) -> None:
    """Copies images from Docker to the nodes."""
    _run("kind", "load", "docker-image", "--name", name, *images)


def down(name: str) -> None:
    """Removes the cluster, its processes and their files."""
    state = _state(name)
    for pid_file in state.glob("*.pid"):
        try:
            os.kill(int(pid_file.read_text()), signal.SIGTERM)
        except ProcessLookupError:
            continue
    _run("kind", "delete", "cluster", "--name", name)
    shutil.rmtree(state, ignore_errors=True)


def _secret(state: Path) -> str:
    path = state / "s3-secret"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(20))
    return path.read_text()


def _start_s3(state: Path, cluster: ClusterAccess, gateway: str) -> None:
    for bucket in BUCKETS:
        (state / "s3" / bucket).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ROOT_ACCESS_KEY": cluster.s3_access_key, "ROOT_SECRET_KEY": cluster.s3_secret_key}
    command = [tool("localcluster", "tool", "versitygw"), "--port", f"{gateway}:{S3_PORT}", "posix", str(state / "s3")]
    _spawn(state, "s3", command, environment, cluster.s3_endpoint)


def _start_mlflow(state: Path, cluster: ClusterAccess, gateway: str) -> None:
    from localcluster import mlflow

    folder = state / "mlflow"
    folder.mkdir(exist_ok=True)
    command = mlflow.command(mlflow.programs(), folder, gateway, MLFLOW_PORT, ("mlflow",))
    _spawn(state, "mlflow", list(command), {**os.environ, **dict(mlflow.ENVIRONMENT)}, f"{cluster.mlflow_url}/health")


def _start_prometheus(state: Path, cluster: ClusterAccess) -> None:
    server = _run(cluster.kubectl, "--kubeconfig", cluster.kubeconfig, "config", "view", "--raw", "-o",
                  "jsonpath={.clusters[0].cluster.server}")  # fmt: skip
    config = {
        "global": {"scrape_interval": "2s"},
        "scrape_configs": [
            {
                "job_name": "finetune",
                "honor_labels": True,
                "kubernetes_sd_configs": [{"role": "pod", "kubeconfig_file": cluster.kubeconfig}],
                "scheme": "https",
                "tls_config": {"insecure_skip_verify": True, **_client_certificate(state, cluster)},
                "relabel_configs": [
                    {
                        "source_labels": ["__meta_kubernetes_pod_label_app_kubernetes_io_part_of",
                                          "__meta_kubernetes_pod_container_port_name"],
                        "regex": "finetune-operator;metrics",
                        "action": "keep",
                    },
                    {
                        "source_labels": ["__meta_kubernetes_namespace", "__meta_kubernetes_pod_name",
                                          "__meta_kubernetes_pod_container_port_number"],
                        "regex": "(.+);(.+);(.+)",
                        "target_label": "__metrics_path__",
                        "replacement": "/api/v1/namespaces/$1/pods/$2:$3/proxy/metrics",
                    },
                    {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
                    {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
                    {"target_label": "__address__", "replacement": server.removeprefix("https://")},
                ],
            }
        ],
    }  # fmt: skip
    path = state / "prometheus.json"  # JSON is valid YAML
    path.write_text(json.dumps(config))
    binary = shutil.which("prometheus")
    if binary is None:
        raise RuntimeError("prometheus is not on PATH; install it (Debian: apt-get install prometheus)")
    address = f"127.0.0.1:{PROMETHEUS_PORT}"
    command = [
        binary,
        f"--config.file={path}",
        f"--storage.tsdb.path={state / 'tsdb'}",
        f"--web.listen-address={address}",
    ]
    _spawn(state, "prometheus", command, dict(os.environ), f"http://{address}/-/ready")


def _client_certificate(state: Path, cluster: ClusterAccess) -> dict[str, str]:
    import base64

    files = {}
    for key, field in (("cert_file", "client-certificate-data"), ("key_file", "client-key-data")):
        path = state / field
        value = _run(cluster.kubectl, "--kubeconfig", cluster.kubeconfig, "config", "view", "--raw", "-o",
                     f"jsonpath={{.users[0].user.{field}}}")  # fmt: skip
        path.touch(mode=0o600)
        path.write_bytes(base64.b64decode(value))
        files[key] = str(path)
    return files


def _spawn(state: Path, name: str, command: list[str], environment: dict[str, str], url: str) -> None:
    pid_file = state / f"{name}.pid"
    if pid_file.exists() and Path(f"/proc/{pid_file.read_text()}").exists():
        return
    with (state / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    pid_file.write_text(str(process.pid))
    end = time.monotonic() + 180
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except urllib.error.HTTPError:
            return  # it is up: S3 refuses anonymous requests
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"{name} did not respond at {url} within 180 s; see {state / name}.log")
