"""The objects that helm renders from the chart."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from conftest import ROOT

CHART = ROOT / "charts" / "finetune-operator"
NAMESPACE = "finetune-system"
RELEASE = "finetune-operator"
EVERYTHING = (
    "monitoring.serviceMonitor.enabled=true",
    "monitoring.podMonitor.enabled=true",
    "monitoring.prometheusRule.enabled=true",
    "monitoring.dashboard.enabled=true",
    "networkPolicy.enabled=true",
)

Object = dict[str, Any]


def run(helm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm, *arguments], text=True, capture_output=True, timeout=120)


def render(helm: str, *sets: str, release: str = RELEASE, values: Path | None = None) -> list[Object]:
    """Return every object of the chart, tests included; `sets` are settings as for `--set`."""
    command = ["template", release, str(CHART), "--namespace", NAMESPACE]
    command += [word for setting in sets for word in ("--set", setting)]
    command += ["--values", str(values)] if values else []
    done = run(helm, *command)
    assert done.returncode == 0, done.stderr
    documents = yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)  # ten times as fast as Python's
    return [document for document in documents if document]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def pod_specs(objects: list[Object]) -> list[Object]:
    """Return the pod spec of every object that creates pods."""
    pods = [one["spec"] for one in of_kind(objects, "Pod")]
    return pods + [one["spec"]["template"]["spec"] for one in of_kind(objects, "Deployment", "Job")]
