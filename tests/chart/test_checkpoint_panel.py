"""What the panel "Oldest checkpoint" shows: the age of checkpoints, or that there is none yet."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.support.helm_rendering import CHART

_DASHBOARD = json.loads((CHART / "dashboards" / "finetune-operator.json").read_text())
(_PANEL,) = [panel for panel in _DASHBOARD["panels"] if panel["title"] == "Oldest checkpoint"]
_OPTIONS = _PANEL["fieldConfig"]["defaults"]
NO_CHECKPOINT = -1
_MINUTES = 60


def phase(job: str, name: str = "Running", value: int = 1) -> dict[str, str]:
    return {f'finetune_job_phase{{namespace="team", job="{job}", phase="{name}"}}': f"{value}x90"}


def checkpoint(job: str, at: int) -> dict[str, str]:
    return {f'finetune_job_checkpoint_timestamp_seconds{{namespace="team", job="{job}"}}': f"{at}x90"}


# case → (series, what the query returns after an hour; None is no value at all)
CASES: dict[str, tuple[dict[str, str], int | None]] = {
    "no job": ({}, None),
    "only a job that waits": (phase("a", "Pending") | phase("a", "Running", 0), None),
    "a running job without a checkpoint": (phase("a"), NO_CHECKPOINT),
    "two running jobs without a checkpoint": (phase("a") | phase("b"), NO_CHECKPOINT),
    "a failed job left the only checkpoint": (phase("a") | phase("b", "Failed") | checkpoint("b", 60), NO_CHECKPOINT),
    "a checkpoint": (phase("a") | checkpoint("a", 3000), 600),
    "the older of two checkpoints": (
        phase("a") | checkpoint("a", 3000) | phase("b") | checkpoint("b", 600),
        3000,
    ),
    "a checkpoint, and a job that has none": (phase("a") | checkpoint("a", 3000) | phase("b"), 600),
}


def promtool(folder: Path, series: dict[str, str], expected: list[dict[str, Any]]) -> str:
    """Compares what the panel's query returns; the text is empty if it is what was expected."""
    tool = shutil.which("promtool")
    assert tool, "promtool is not installed; as root, `python3 -m localcluster packages` installs it (prometheus)"
    query = _PANEL["targets"][0]["expr"].replace("$namespace", ".*").replace("$job", ".*")
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": f"{_MINUTES}m", "exp_samples": expected}],
    }
    (folder / "test.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
    done = subprocess.run([tool, "test", "rules", "test.yml"], cwd=folder, text=True, capture_output=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize(("series", "value"), CASES.values(), ids=CASES)
def test_the_query_returns_an_age_or_that_no_job_has_a_checkpoint(
    series: dict[str, str], value: int | None, tmp_path: Path
) -> None:
    expected = [] if value is None else [{"labels": "{}", "value": value}]
    assert promtool(tmp_path, series, expected) == ""


def color_of(value: float | None) -> str:
    """Returns the color of a value; Grafana gives the lowest threshold's to one that is missing."""
    steps = _OPTIONS["thresholds"]["steps"]
    reached = [step for step in steps if step["value"] is None or (value is not None and value >= step["value"])]
    return str(reached[-1]["color"])


def test_only_a_recent_checkpoint_is_good_news() -> None:
    (mapping,) = _OPTIONS["mappings"]
    assert mapping["type"] == "value"
    (shown,) = mapping["options"].items()
    assert shown[0] == str(NO_CHECKPOINT)
    assert (shown[1]["text"], shown[1]["color"]) == ("no checkpoint yet", "orange")
    assert _OPTIONS["noValue"] == "no running job"
    assert [color_of(value) for value in (None, 0, 7199, 7200)] == ["text", "green", "green", "red"]
