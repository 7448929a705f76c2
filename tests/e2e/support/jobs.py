"""Helpers of the end-to-end tests: jobs as a person writes them, and what a person can see of
them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore

from api.support.api_server import Server
from demo import install, watch
from demo.clusters import ClusterAccess
from finetune_api.names import MANIFEST_PATH

NAMESPACE = "e2e"


def fine_tune_job(name: str, **spec: Any) -> dict[str, Any]:
    """Return a small valid job that ends within seconds; keyword arguments replace full sections of
    spec."""
    defaults: dict[str, Any] = {
        "model": {"uri": "s3://models/tiny-llama", "dtype": "float32", "credentialsRef": {"name": "s3"}},
        "dataset": {
            "uri": "s3://data/tiny/train.jsonl",
            "test": {"uri": "s3://data/tiny/test.jsonl"},
            "validation": {"fraction": 0.1},
            "maxSequenceLength": 64,
            "credentialsRef": {"name": "s3"},
        },
        "method": {"type": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0}},
        "training": {"maxSteps": 12, "globalBatchSize": 8, "learningRate": 1e-3},
        "distribution": {"nodes": 1, "processesPerNode": 1},
        "resources": {"cpu": "300m", "memory": "1500Mi", "scratch": "2Gi", "sharedMemory": "128Mi"},
        "output": {"uri": f"s3://outputs/{name}", "credentialsRef": {"name": "s3"}},
    }
    return {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {**defaults, **spec},
    }


@dataclass(frozen=True)
class World:
    """The cluster, and actions and queries on it."""

    cluster: ClusterAccess
    operator_image: str
    trainer_image: str

    def kubectl(self, *args: str, stdin: str | None = None, check: bool = True) -> str:
        return self.cluster.kubectl_run("-n", NAMESPACE, *args, stdin=stdin, check=check)

    def apply(self, job: dict[str, Any]) -> str:
        self.kubectl("apply", "-f", "-", stdin=json.dumps(job))
        name: str = job["metadata"]["name"]
        return name

    def delete(self, name: str) -> None:
        self.kubectl("delete", "ftj", name, "--ignore-not-found", "--wait=false")

    def status(self, name: str) -> dict[str, Any]:
        """Return the job's status. Tests ask for it twice a second, so starting kubectl would take
        too much processor time."""
        path = f"/apis/finetune-operator.io/v1alpha1/namespaces/{NAMESPACE}/finetunejobs/{name}"
        answer = Server(Path(self.cluster.kubeconfig)).request("GET", path)
        assert answer.accepted, answer.message
        status: dict[str, Any] = answer.body.get("status", {})
        return status

    def suspend(self, name: str, suspended: bool) -> None:
        patch = json.dumps({"spec": {"runPolicy": {"suspend": suspended}}})
        self.kubectl("patch", "ftj", name, "--type=merge", "-p", patch)

    def pods(self, name: str) -> list[dict[str, Any]]:
        """Return the existing pods of a job, in any state."""
        answer = json.loads(self.kubectl("get", "pods", "-l", f"finetune-operator.io/job-name={name}", "-o", "json"))
        items: list[dict[str, Any]] = answer["items"]
        return items

    def live_pods(self, name: str) -> list[str]:
        return [
            pod["metadata"]["name"] for pod in self.pods(name) if pod["status"].get("phase") in ("Pending", "Running")
        ]

    def until(
        self, name: str, holds: Callable[[dict[str, Any]], bool], seconds: float = 360, what: str = ""
    ) -> dict[str, Any]:
        """Return the first status for which `holds` is true. Fails with all that a person would
        look at."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.status(name)
            if holds(status):
                return status
            time.sleep(0.5)
        raise AssertionError(f"{name}: not {what or 'as awaited'} after {seconds:.0f} s\n{self.account(name)}")

    def until_phase(self, name: str, *phases: str, seconds: float = 360) -> dict[str, Any]:
        status = self.until(
            name, lambda s: s.get("phase") in (*phases, "Succeeded", "Failed"), seconds, " or ".join(phases)
        )
        assert status["phase"] in phases, f"{name} is {status['phase']}\n{self.account(name)}"
        return status

    def until_step(self, name: str, step: int, seconds: float = 360) -> None:
        """Wait until the trainer's own metrics report that `step` steps are done."""
        end = time.monotonic() + seconds
        query = f'max(finetune_train_steps_total{{namespace="{NAMESPACE}",job="{name}"}})'
        while time.monotonic() < end:
            if (watch.newest(self.cluster, query) or 0) >= step:
                return
            assert self.status(name).get("phase") not in ("Succeeded", "Failed"), self.account(name)
            time.sleep(0.5)
        raise AssertionError(f"{name}: step {step} was not reached in {seconds:.0f} s\n{self.account(name)}")

    def account(self, name: str) -> str:
        """Return all that a person would look at when a job isn't as expected."""
        parts = [json.dumps(self.status(name), indent=1)]
        parts.append(self.kubectl("get", "ftj,jobs,pods,events", check=False)[-4000:])
        for pod in self.pods(name):
            pod_name = pod["metadata"]["name"]
            parts.append(f"--- {pod_name}\n" + self.kubectl("logs", pod_name, "--tail=40", check=False))
        parts.append(
            self.cluster.kubectl_run(
                "-n",
                install.OPERATOR_NAMESPACE,
                "logs",
                "-l",
                "app.kubernetes.io/name=finetune-operator",
                "--tail=40",
                check=False,
            )
        )
        return "\n".join(parts)

    def artifact(self, name: str) -> dict[str, Any]:
        """Return the manifest in the destination."""
        store = install.s3_store(self.cluster, "outputs")
        manifest: dict[str, Any] = json.loads(bytes(obstore.get(store, f"{name}/{MANIFEST_PATH}").bytes()))
        return manifest

    def files(self, name: str) -> set[str]:
        """Return the paths in the destination, relative to it."""
        store = install.s3_store(self.cluster, "outputs")
        return {
            meta["path"].removeprefix(f"{name}/") for batch in obstore.list(store, prefix=f"{name}/") for meta in batch
        }

    def download(self, name: str, path: str) -> bytes:
        return bytes(obstore.get(install.s3_store(self.cluster, "outputs"), f"{name}/{path}").bytes())
