"""Discovers the pods that Prometheus scrapes: it watches pods and writes a file_sd file.

Debian's Prometheus is built without Kubernetes service discovery. This module selects what a
PodMonitor would: pods of this project with a container port named `metrics`. It never writes to
the API server.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from localcluster.api import Api, ApiError

SELECTOR = "app.kubernetes.io/part-of=finetune-operator"
PORT_NAME = "metrics"
_WATCH_SECONDS = 300


def targets(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one file_sd group for each metrics port of a running pod. Pure."""
    groups = [
        {
            "targets": [f"{pod['status']['podIP']}:{port['containerPort']}"],
            "labels": {"namespace": pod["metadata"]["namespace"], "pod": pod["metadata"]["name"]},
        }
        for pod in pods
        if pod.get("status", {}).get("phase") == "Running" and pod["status"].get("podIP")
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
        for port in container.get("ports", [])
        if port.get("name") == PORT_NAME
    ]
    return sorted(groups, key=lambda group: str(group["targets"]))


def follow(api: Api, file: Path) -> None:
    """Lists pods, then watches them until the watch ends; then the caller starts over.

    Raises ApiError.
    """
    query = urlencode({"labelSelector": SELECTOR})
    listed = api.get(f"/api/v1/pods?{query}")
    pods = {pod["metadata"]["uid"]: pod for pod in listed["items"]}
    version = listed["metadata"]["resourceVersion"]
    written = _write(file, list(pods.values()), None)
    query = urlencode(
        {
            "labelSelector": SELECTOR,
            "watch": "true",
            "resourceVersion": version,
            "timeoutSeconds": _WATCH_SECONDS,
        }
    )
    for line in api.lines(f"/api/v1/pods?{query}", _WATCH_SECONDS + 30):
        event = json.loads(line)
        if event["type"] == "ERROR":
            return
        pod = event["object"]
        if event["type"] == "DELETED":
            pods.pop(pod["metadata"]["uid"], None)
        else:
            pods[pod["metadata"]["uid"]] = pod
        written = _write(file, list(pods.values()), written)


def _write(file: Path, pods: list[dict[str, Any]], before: str | None) -> str:
    """Writes the targets unless they equal the text `before`; returns their text."""
    text = json.dumps(targets(pods), indent=1)
    if text != before:
        draft = file.with_suffix(".tmp")
        draft.write_text(text)
        draft.rename(file)
    return text


def main(server: str, pki: str, file: str) -> None:
    """Follows the pods forever; if the API server fails, it retries every second."""
    api = Api(server, Path(pki))
    while True:
        try:
            follow(api, Path(file))
        except ApiError as error:
            print(f"localcluster discovery: {error}; retrying in 1 s", file=sys.stderr, flush=True)
            time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
