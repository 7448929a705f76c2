"""Chooses the cluster for the demo and the end-to-end tests: kind if a Docker engine responds.

Otherwise it is hack/localcluster. Both are reached through the same ClusterAccess, so no other
module knows which one it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ClusterAccess:
    """A running cluster with object storage and Prometheus.

    Its addresses are reachable both from this machine and from the cluster's pods.
    """

    name: str
    kubeconfig: str
    kubectl: str
    helm: str
    s3_endpoint: str
    s3_access_key: str
    s3_secret_key: str
    s3_region: str
    prometheus_url: str
    mlflow_url: str = ""

    def kubectl_run(self, *args: str, stdin: str | None = None, check: bool = True) -> str:
        """Returns kubectl's standard output.

        Raises RuntimeError with its standard error if it fails and `check` is set.
        """
        done = subprocess.run(
            [self.kubectl, "--kubeconfig", self.kubeconfig, *args], input=stdin, text=True, capture_output=True
        )
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def docker_answers() -> bool:
    """Whether this machine has kind and a Docker engine that responds (not just its client)."""
    if not (shutil.which("docker") and shutil.which("kind")):
        return False
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def tool(module: str, *args: str) -> str:
    """Runs `python3 -m <module of hack/>` and returns its standard output.

    Its messages go straight to standard error. Raises RuntimeError if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "hack")}
    command = ["python3", "-m", module, *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(args)} ended with exit code {done.returncode}; see its output above")
    return done.stdout.strip()


def build_images() -> tuple[str, str]:
    """Returns the names of the operator and trainer images, built if their content changed."""
    operator, trainer = (tool("images", "build", which).splitlines()[-1] for which in ("operator", "trainer"))
    return operator, trainer


def up(name: str, *options: str, mlflow: bool = False) -> ClusterAccess:
    """Starts a local cluster with object storage, Prometheus and, if requested, MLflow.

    Raises RuntimeError if a part fails to start.
    """
    if docker_answers():
        from demo import kind

        return kind.up(name, mlflow=mlflow)
    addons = "s3,prometheus,mlflow" if mlflow else "s3,prometheus"
    tool("localcluster", "up", "--name", name, "--addons", addons, *options)
    return access(name)


def access(name: str) -> ClusterAccess:
    """Returns the access to a cluster that is already up."""
    state = json.loads(tool("localcluster", "status", "--name", name, "--json"))
    s3 = state["s3"]
    return ClusterAccess(
        name=name,
        kubeconfig=state["kubeconfig"],
        kubectl=tool("localcluster", "tool", "kubectl"),
        helm=tool("localcluster", "tool", "helm"),
        s3_endpoint=s3["endpoint"],
        s3_access_key=s3["accessKeyId"],
        s3_secret_key=s3["secretAccessKey"],
        s3_region=s3.get("region", "us-east-1"),
        prometheus_url=state["prometheus"]["url"],
        mlflow_url=(state["mlflow"] or {}).get("url", ""),
    )


def load(name: str, *images: str) -> None:
    """Loads images onto the cluster's node."""
    if docker_answers():
        from demo import kind

        kind.load(name, *images)
    else:
        tool("localcluster", "load", "--name", name, *images)


def remove(name: str) -> None:
    """Removes the cluster and everything that belongs to it."""
    if docker_answers():
        from demo import kind

        kind.down(name)
    else:
        tool("localcluster", "down", "--name", name)
