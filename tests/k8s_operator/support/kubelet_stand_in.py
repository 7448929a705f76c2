"""A namespace of a real API server, in which a test creates jobs and plays the kubelet. The Job
controller, the garbage collector and the scheduler are real; the test does only what a node would
do to a pod."""

from __future__ import annotations

import copy
import http.client
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from api.support.api_server import Answer, Server
from finetune_api import names
from finetune_api.messages.result import Result, encode

NODE = "played-node"
T = TypeVar("T")
Raw = dict[str, Any]

SPEC: Raw = {
    "model": {"uri": "s3://models/base"},
    "dataset": {"uri": "s3://data/train.jsonl"},
    "method": {"type": "lora", "lora": {}},
    "output": {"uri": "s3://outputs/result"},
}
_PATIENCE = 3  # other tests compute at the same time


def job_body(name: str, **sections: Any) -> Raw:
    """Return a FineTuneJob. Sections are merged into the smallest spec, one level deep:
    run_policy={"suspend": True}."""
    spec = copy.deepcopy(SPEC)
    for section, content in sections.items():
        key = {"run_policy": "runPolicy"}.get(section, section)
        spec[key] = {**spec.get(key, {}), **content}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


class World:
    """One namespace, its objects, and the actions of its kubelet."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self.namespace = namespace
        self._kubeconfig = kubeconfig
        self._server = Server(kubeconfig)

    # -- the API server ------

    def request(
        self, method: str, path: str, body: Any = None, content: str = "application/json", **query: str
    ) -> Answer:
        """Send a request. If the connection is dead, retry on a new one for up to 30 s, in which
        the server may restart."""
        deadline = time.monotonic() + 30
        while True:
            try:
                return self._server.request(method, path, body, content, **query)
            except (OSError, http.client.HTTPException):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
                self._server = Server(self._kubeconfig)

    def path(self, resource: str, name: str = "") -> str:
        group = {
            "finetunejobs": f"/apis/{names.API_VERSION}",
            "jobs": "/apis/batch/v1",
            "networkpolicies": "/apis/networking.k8s.io/v1",
            "leases": "/apis/coordination.k8s.io/v1",
        }.get(resource, "/api/v1")
        return f"{group}/namespaces/{self.namespace}/{resource}" + (f"/{name}" if name else "")

    def create(self, resource: str, body: Raw) -> Raw:
        answer = self.request("POST", self.path(resource), body)
        assert answer.accepted, answer.message
        return answer.body

    def get(self, resource: str, name: str) -> Raw | None:
        answer = self.request("GET", self.path(resource, name))
        return answer.body if answer.accepted else None

    def all(self, resource: str, **labels: str) -> list[Raw]:
        selector = "%2C".join(f"{key}%3D{value}" for key, value in labels.items())
        answer = self.request("GET", self.path(resource), labelSelector=selector)
        assert answer.accepted, answer.message
        items: list[Raw] = answer.body["items"]
        return items

    def patch(self, resource: str, name: str, body: Raw, subresource: str = "") -> Answer:
        path = self.path(resource, name) + (f"/{subresource}" if subresource else "")
        return self.request("PATCH", path, body, "application/merge-patch+json")

    def delete(self, resource: str, name: str, **options: Any) -> Answer:
        return self.request(
            "DELETE", self.path(resource, name), {"apiVersion": "v1", "kind": "DeleteOptions", **options}
        )

    # -- FineTuneJobs ------

    def submit(self, name: str, **sections: Any) -> Raw:
        return self.create("finetunejobs", job_body(name, **sections))

    def status(self, name: str) -> Raw:
        body = self.get("finetunejobs", name)
        status: Raw = (body or {}).get("status", {})
        return status

    def condition(self, name: str, kind: str) -> Raw:
        return next((c for c in self.status(name).get("conditions", ()) if c["type"] == kind), {})

    def message(self, name: str) -> str:
        """Return the longest message of the conditions: that of status may be shortened."""
        return max((str(c.get("message", "")) for c in self.status(name).get("conditions", ())), key=len, default="")

    def suspend(self, name: str, value: bool = True) -> None:
        answer = self.patch("finetunejobs", name, {"spec": {"runPolicy": {"suspend": value}}})
        assert answer.accepted, answer.message

    def wait_phase(self, name: str, phase: str, seconds: float = 15) -> Raw:
        """Wait until the operator has written this phase, and return the status."""

        def arrived() -> Raw | None:
            status = self.status(name)
            return status if status.get("phase") == phase and status.get("observedGeneration") else None

        return self.wait(arrived, seconds, lambda: f"{phase} of {name}; it is {self.status(name)}")

    def wait_job(self, name: str, seconds: float = 15) -> Raw:
        """Wait for the batch/v1 Job of that name and return it."""
        return self.wait(lambda: self.get("jobs", name), seconds, lambda: f"Job {name}")

    # -- playing the kubelet ------

    def wait_pods(self, job: str, count: int = 1, seconds: float = 15) -> list[Raw]:
        """Wait for the pods of a batch/v1 Job that haven't ended, and return them by index."""

        def there() -> list[Raw] | None:
            pods = [
                pod
                for pod in self.all("pods", **{"batch.kubernetes.io/job-name": job})
                if pod["status"].get("phase") in ("Pending", "Running")
            ]
            return sorted(pods, key=_index) if len(pods) >= count else None

        return self.wait(there, seconds, lambda: f"{count} pods of {job}")

    def run_pods(self, job: str, count: int = 1) -> list[Raw]:
        """Schedule the pods of a Job and start their containers."""
        pods = self.wait_pods(job, count)
        for pod in pods:
            self.run_pod(pod)
        return pods

    def run_pod(self, pod: Raw) -> None:
        name = pod["metadata"]["name"]
        self.bind(pod)
        self._pod_status(name, "Running", {"running": {"startedAt": _now()}})

    def bind(self, pod: Raw) -> None:
        name = pod["metadata"]["name"]
        target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        answer = self.request("POST", self.path("pods", name) + "/binding", binding)
        assert answer.accepted or answer.code == 409, answer.message

    def end_pod(self, pod: Raw, exit_code: int = 0, result: Result | None = None, reason: str = "") -> None:
        """End the container of a pod. A pod that was being deleted then disappears."""
        name = pod["metadata"]["name"]
        ended = {
            "exitCode": exit_code,
            "reason": reason or ("Completed" if exit_code == 0 else "Error"),
            "message": encode(result) if result else "",
            "finishedAt": _now(),
        }
        self._pod_status(name, "Succeeded" if exit_code == 0 else "Failed", {"terminated": ended})
        there = self.get("pods", name)
        if there and "deletionTimestamp" in there["metadata"]:
            self.delete("pods", name, gracePeriodSeconds=0)

    def end_deleted_pods(self, job: str, exit_code: int = 143, result: Result | None = None) -> int:
        """End those pods of a Job that are being deleted, and return how many they are."""
        deleted = [
            pod
            for pod in self.all("pods", **{"batch.kubernetes.io/job-name": job})
            if "deletionTimestamp" in pod["metadata"] and pod["status"].get("phase") in ("Pending", "Running")
        ]
        for pod in deleted:
            self.end_pod(pod, exit_code, result)
        return len(deleted)

    def leave(self, job: str, exit_code: int = 143, result: Result | None = None, seconds: float = 20) -> None:
        """End every pod of a Job as soon as it is deleted, until none runs.

        A later Job of the same name doesn't count: its pods may be there before this returns.
        """
        leaving = {_controller(pod) for pod in self.all("pods", **{"batch.kubernetes.io/job-name": job})}

        def all_left() -> bool:
            self.end_deleted_pods(job, exit_code, result)
            pods = self.all("pods", **{"batch.kubernetes.io/job-name": job})
            return all(
                pod["status"].get("phase") in ("Succeeded", "Failed") for pod in pods if _controller(pod) in leaving
            )

        self.wait(all_left, seconds, lambda: f"end of the pods of {job}")

    def waiting_container(self, pod: Raw, reason: str, message: str) -> None:
        self.bind(pod)
        self._pod_status(pod["metadata"]["name"], "Pending", {"waiting": {"reason": reason, "message": message}})

    def warn(self, pod: Raw, reason: str, message: str) -> None:
        """Create an Event as the kubelet does."""
        meta = pod["metadata"]
        involved = {
            "kind": "Pod",
            "namespace": self.namespace,
            "name": meta["name"],
            "uid": meta["uid"],
            "apiVersion": "v1",
        }
        self.create(
            "events",
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"generateName": f"{meta['name']}."},
                "involvedObject": involved,
                "type": "Warning",
                "reason": reason,
                "message": message,
                "firstTimestamp": _now(),
                "lastTimestamp": _now(),
                "count": 1,
                "source": {"component": "kubelet"},
            },
        )

    def _pod_status(self, name: str, phase: str, state: Raw) -> None:
        container = {
            "name": names.CONTAINER_TRAINER,
            "image": "i",
            "imageID": "",
            "ready": "running" in state,
            "restartCount": 0,
            "state": state,
        }
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": _now()}
        status = {"phase": phase, "conditions": [scheduled], "containerStatuses": [container]}
        answer = self.patch("pods", name, {"status": status}, "status")
        assert answer.accepted, answer.message

    # -- waiting ------

    def wait(self, question: Callable[[], T | None], seconds: float = 15, what: Callable[[], str] = lambda: "it") -> T:
        """Ask `question` until its answer isn't empty, and return the answer. Raises AssertionError
        after `seconds`."""
        deadline = time.monotonic() + _PATIENCE * seconds
        while time.monotonic() < deadline:
            answer = question()
            if answer:
                return answer
            time.sleep(0.05)
        raise AssertionError(f"after {seconds} s still no {what()}")


def audit_writes(log: Path, namespace: str, agent: str = names.FIELD_MANAGER) -> list[str]:
    """Return the operator's writes into a namespace, in order, as `verb resource/subresource`."""
    writes = []
    for line in log.read_text().splitlines():
        event = json.loads(line)
        target = event.get("objectRef", {})
        if event["verb"] in ("get", "list", "watch") or event.get("stage") != "ResponseComplete":
            continue
        if target.get("namespace") == namespace and event.get("userAgent", "").startswith(agent):
            writes.append("/".join(filter(None, (f"{event['verb']} {target['resource']}", target.get("subresource")))))
    return writes


def _index(pod: Raw) -> tuple[int, str]:
    label = pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", "0")
    return (int(label), pod["metadata"]["name"])


def _controller(pod: Raw) -> str:
    uid: str = pod["metadata"]["labels"].get("batch.kubernetes.io/controller-uid", "")
    return uid


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
