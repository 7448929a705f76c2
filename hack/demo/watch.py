"""Follows one FineTuneJob to its end: status from the API server, step and loss from Prometheus.

It only reads.
"""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from demo.clusters import ClusterAccess


@dataclass(frozen=True)
class JobView:
    """The visible state of a job at one moment."""

    phase: str
    message: str
    step: int
    total_steps: int
    train_loss: float | None
    status: dict[str, Any]

    @property
    def is_over(self) -> bool:
        """Whether the job succeeded or failed."""
        return self.phase in ("Succeeded", "Failed")


def job(cluster: ClusterAccess, namespace: str, name: str) -> dict[str, Any]:
    """Returns the FineTuneJob from the API server."""
    body: dict[str, Any] = json.loads(cluster.kubectl_run("-n", namespace, "get", "ftj", name, "-o", "json"))
    return body


def prometheus(cluster: ClusterAccess, path: str, **parameters: str) -> list[dict[str, Any]]:
    """Returns the `result` of a Prometheus query (`query` or `query_range`).

    It is empty if Prometheus doesn't respond.
    """
    url = f"{cluster.prometheus_url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
            return result
    except OSError:
        return []


def newest(cluster: ClusterAccess, query: str) -> float | None:
    """Returns the value of an instant query's first series, None if there is none."""
    series = prometheus(cluster, "query", query=query)
    return float(series[0]["value"][1]) if series else None


def view(cluster: ClusterAccess, namespace: str, name: str) -> JobView:
    """Returns the current state; step and loss come from status if Prometheus has none."""
    status = job(cluster, namespace, name).get("status", {})
    progress = status.get("progress") or {}
    labels = f'{{namespace="{namespace}",job="{name}"}}'
    live_step = newest(cluster, f"max(finetune_train_steps_total{labels})")
    live_loss = newest(cluster, f"max(finetune_train_loss{labels})")
    loss = live_loss if live_loss is not None else progress.get("trainLoss")
    return JobView(
        phase=status.get("phase", "Pending"),
        message=status.get("message") or progress.get("message", ""),
        step=max(int(live_step or 0), progress.get("step", 0)),
        total_steps=progress.get("totalSteps", 0),
        train_loss=loss,
        status=status,
    )


def follow(
    cluster: ClusterAccess, namespace: str, name: str, limit_seconds: float, every: float = 1.0
) -> Iterator[JobView]:
    """Yields the state every `every` seconds until the job is over.

    Raises TimeoutError after `limit_seconds`.
    """
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        current = view(cluster, namespace, name)
        yield current
        if current.is_over:
            return
        time.sleep(every)
    raise TimeoutError(f"{namespace}/{name} was not over after {limit_seconds:.0f} s")
