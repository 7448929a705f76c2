"""What the operator exports of a job: from its status, and from the newest progress report."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from finetune_api.messages.progress import Progress
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.progress_store import ProgressStore
from finetune_operator.servers import job_metrics


def _exported(phase: str, trainer_phase: str | None) -> dict[tuple[str, str], float]:
    """Values by metric name and `phase` label, of a job in a phase whose trainer reported one."""
    cache, store = Cache(), ProgressStore()
    body: dict[str, Any] = {
        "metadata": {"namespace": "team", "name": "a", "uid": "u-1", "resourceVersion": "1", "generation": 1},
        "spec": {},
        "status": {"phase": phase},
    }
    cache.put_body(body)
    if trainer_phase:
        store.put("u-1", Progress(attempt=1, phase=trainer_phase), "2026-01-01T00:00:00Z")
    registry = CollectorRegistry()
    job_metrics.register(registry, cache, store, 3600)
    return {
        (sample.name, sample.labels.get("phase", "")): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("phase", "trainer_phase", "exported"),
    [
        ("Running", "fetching", "fetching"),
        ("Running", "training", "training"),
        ("Running", None, ""),
        ("Failed", "training", ""),
    ],
)
def test_what_the_trainer_does_is_exported_while_it_runs(phase: str, trainer_phase: str | None, exported: str) -> None:
    series = _exported(phase, trainer_phase)
    assert series["finetune_job_phase", phase] == 1
    phases = {label for name, label in series if name == "finetune_job_trainer_phase"}
    assert phases == ({exported} if exported else set())
