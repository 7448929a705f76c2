"""Follows one FineTuneJob to its end: status from the API server, step and loss from Prometheus.

Called by demo.story and tests/e2e. Reads only.
"""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from demo.clusters import Place


@dataclass(frozen=True)
class Sight:
    """What is to be seen of a job at one moment."""

    phase: str
    message: str
    step: int
    total_steps: int
    train_loss: float | None
    status: dict[str, Any]

    @property
    def is_over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")


def job(place: Place, namespace: str, name: str) -> dict[str, Any]:
    """The FineTuneJob as the API server has it."""
    body: dict[str, Any] = json.loads(place.kubectl_run("-n", namespace, "get", "ftj", name, "-o", "json"))
    return body


def prometheus(place: Place, path: str, **parameters: str) -> list[dict[str, Any]]:
    """The `result` of a Prometheus query (`query` or `query_range`); empty where it doesn't answer."""
    url = f"{place.prometheus_url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result
    except OSError:
        return []


def newest(place: Place, query: str) -> float | None:
    """The value of an instant query's first series."""
    series = prometheus(place, "query", query=query)
    return float(series[0]["value"][1]) if series else None


def sight(place: Place, namespace: str, name: str) -> Sight:
    status = job(place, namespace, name).get("status", {})
    progress = status.get("progress") or {}
    labels = f'{{namespace="{namespace}",job="{name}"}}'
    live_step = newest(place, f"max(finetune_train_steps_total{labels})")
    live_loss = newest(place, f"max(finetune_train_loss{labels})")
    loss = live_loss if live_loss is not None else progress.get("trainLoss")
    return Sight(
        phase=status.get("phase", "Pending"),
        message=status.get("message") or progress.get("message", ""),
        step=max(int(live_step or 0), progress.get("step", 0)),
        total_steps=progress.get("totalSteps", 0),
        train_loss=loss,
        status=status,
    )


def follow(place: Place, namespace: str, name: str, limit_seconds: float, every: float = 1.0) -> Iterator[Sight]:
    """Sights until the job is over. Raises TimeoutError after `limit_seconds`."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        now = sight(place, namespace, name)
        yield now
        if now.is_over:
            return
        time.sleep(every)
    raise TimeoutError(f"{namespace}/{name} was not over after {limit_seconds:.0f} s")
