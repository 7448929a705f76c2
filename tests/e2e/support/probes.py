"""Pods that try to connect to others, and programs that listen in pods."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from demo.clusters import ClusterAccess

PORT = 8000  # on which a probe itself listens
NAME = 0  # instead of a port: whether the name has an address
_LISTEN = f"""
import socket
server = socket.create_server(("", {PORT}))
while True:
    server.accept()[0].close()
"""
_LISTEN_UNTIL_END_OF_INPUT = """
import os, socket, sys, threading
server = socket.create_server(("", 0))
def serve():
    while True:
        server.accept()[0].close()
threading.Thread(target=serve, daemon=True).start()
print(server.getsockname()[1], flush=True)
sys.stdin.read()
os._exit(0)
"""
_CONNECT = """
import concurrent.futures, json, socket, sys
def reached(target):
    host, port = target
    try:
        if port:
            socket.create_connection((host, port), 3).close()
        else:
            socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
targets = json.loads(sys.argv[1])
with concurrent.futures.ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps(list(pool.map(reached, targets))))
"""


@dataclass(frozen=True)
class Pod:
    """A pod whose image has Python."""

    cluster: ClusterAccess
    namespace: str
    name: str

    @property
    def manifest(self) -> dict[str, Any]:
        """The pod as the API server returns it."""
        text = self.cluster.kubectl_run("-n", self.namespace, "get", "pod", self.name, "-o", "json")
        body: dict[str, Any] = json.loads(text)
        return body

    @property
    def address(self) -> str:
        """The pod's address."""
        address: str = self.manifest["status"]["podIP"]
        return address

    def reached(self, targets: Mapping[str, tuple[str, int]]) -> set[str]:
        """Returns the names of the targets (host, port) to which this pod can connect now."""
        command = ("exec", self.name, "--", "python3", "-c", _CONNECT, json.dumps(list(targets.values())))
        answers = json.loads(self.cluster.kubectl_run("-n", self.namespace, *command))
        return {name for name, answer in zip(targets, answers, strict=True) if answer}

    @contextmanager
    def listening(self) -> Iterator[int]:
        """Listens in the pod while the body runs; yields the port."""
        kubectl = [self.cluster.kubectl, "--kubeconfig", self.cluster.kubeconfig, "-n", self.namespace]
        command = [*kubectl, "exec", "-i", self.name, "--", "python3", "-c", _LISTEN_UNTIL_END_OF_INPUT]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            yield int(process.stdout.readline())
            process.stdin.close()


def probe(name: str, image: str, node: str = "", labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns a pod that namespaces with restricted pods admit, and that listens on PORT."""
    container = {
        "name": "main",
        "image": image,
        "command": ["python3", "-c", _LISTEN],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": dict(labels or {})},
        "spec": {
            **({"nodeName": node} if node else {}),
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
        },
    }
