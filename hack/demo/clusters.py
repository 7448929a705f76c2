"""Which cluster the demo and the end-to-end tests run on: kind where a Docker engine answers, else hack/localcluster.

Called by demo.story and tests/e2e. Both kinds give the same few values; nothing else knows which one it is.
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
class Place:
    """A running cluster with object storage and Prometheus, as seen from this machine and from its pods alike."""

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
        """kubectl's standard output; raises CalledProcessError with its standard error in the message."""
        done = subprocess.run(
            [self.kubectl, "--kubeconfig", self.kubeconfig, *args], input=stdin, text=True, capture_output=True
        )
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def docker_answers() -> bool:
    """Whether a Docker engine (not just its client) and kind are here."""
    if not (shutil.which("docker") and shutil.which("kind")):
        return False
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def tool(module: str, *args: str) -> str:
    """Standard output of `python3 -m <module of hack/>`; its words for people go to standard error as they come."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "hack")}
    command = ["python3", "-m", module, *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(args)} ended with {done.returncode}; its words stand above")
    return done.stdout.strip()


def build_images() -> tuple[str, str]:
    """Names of the operator's and the trainer's image, built if their content changed."""
    operator, trainer = (tool("images", "build", which).splitlines()[-1] for which in ("operator", "trainer"))
    return operator, trainer


def up(name: str, *options: str, mlflow: bool = False) -> Place:
    """A local cluster with object storage, Prometheus and, if asked, MLflow. Raises RuntimeError when a part fails."""
    if docker_answers():
        from demo import kind

        return kind.up(name, mlflow=mlflow)
    addons = "s3,prometheus,mlflow" if mlflow else "s3,prometheus"
    tool("localcluster", "up", "--name", name, "--addons", addons, *options)
    return place(name)


def place(name: str) -> Place:
    """A cluster that is up already."""
    state = json.loads(tool("localcluster", "status", "--name", name, "--json"))
    s3 = state["s3"]
    return Place(
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
    """Make images known to the cluster's node."""
    if docker_answers():
        from demo import kind

        kind.load(name, *images)
    else:
        tool("localcluster", "load", "--name", name, *images)


def remove(name: str) -> None:
    """Leave nothing of the cluster behind."""
    if docker_answers():
        from demo import kind

        kind.down(name)
    else:
        tool("localcluster", "down", "--name", name)
