"""Every query of the dashboard and the alerts parses and reads only series that the code defines,
and alerts fire when they should (promtool)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client import CollectorRegistry

from chart.support.helm_rendering import CHART, EVERYTHING, of_kind, render
from finetune_api.messages.events import CheckpointEvent
from finetune_api.messages.run import JobRef
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.progress_store import ProgressStore
from finetune_operator.servers import job_metrics
from finetune_operator.servers import metrics as operator_metrics
from finetune_trainer.reporting import prometheus as trainer_metrics
from finetune_trainer.reporting.gpus import xids
from finetune_trainer.reporting.gpus.nvml import Device, Reading
from finetune_trainer.reporting.gpus.watch import Observation

DASHBOARD = json.loads((CHART / "dashboards" / "finetune-operator.json").read_text())
_VARIABLES = {"$__rate_interval": "5m", "$namespace": ".*", "$job": ".*"}


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


@cache
def rules(helm: str) -> list[dict[str, Any]]:
    """Returns the alerts; nobody may change them."""
    (rule,) = of_kind(render(helm, *EVERYTHING), "PrometheusRule")
    return [one for group in rule["spec"]["groups"] for one in group["rules"]]


def without_variables(query: str) -> str:
    for variable, value in _VARIABLES.items():
        query = query.replace(variable, value)
    return query


def series_of(registry: CollectorRegistry) -> set[str]:
    """Return names of series as Prometheus stores them."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes.get(family.type, ("",))}


class OneGpu:
    """Replaces NVML, so that the GPU series exist."""

    def observe(self) -> Observation:
        reading = Reading(
            Device(0, "GPU-a"), 0.5, 1, 2, power_watts=1, temperature_celsius=1, sm_clock_hertz=1,
            throttled={"power_cap": False}, pcie={"tx": 1}, nvlink={"tx": 1}, ecc_errors={"corrected": 0},
            remapped_rows={"failed": 0},
        )  # fmt: skip
        return Observation((reading,), xids={(0, 79): 1})


def defined_series() -> set[str]:
    operator = operator_metrics.Metrics()
    job_metrics.register(operator.registry, Cache(), ProgressStore(), 3600)
    trainer = trainer_metrics.Metrics(JobRef(namespace="n", name="j", uid="u", attempt=1), OneGpu())
    trainer.observe(CheckpointEvent(time=0, step=1, path="/x", seconds=1, bytes=1))
    return series_of(operator.registry) | series_of(trainer.registry)


def queried_series(query: str) -> set[str]:
    return set(re.findall(r"\b(?:finetune|process)_[a-z0-9_]+", query))


@pytest.mark.parametrize("query", dashboard_queries())
def test_a_query_of_the_dashboard_parses(query: str) -> None:
    promql_parser.parse(without_variables(query))


def test_every_alert_parses_and_has_a_description(helm: str) -> None:
    for rule in rules(helm):
        promql_parser.parse(rule["expr"])
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_dashboard_and_alerts_query_only_series_that_exist(helm: str) -> None:
    queried = {
        name
        for query in [*dashboard_queries(), *(rule["expr"] for rule in rules(helm))]
        for name in queried_series(query)
    }
    assert queried <= defined_series()


def test_the_dashboard_uses_nearly_all_series_of_the_trainer() -> None:
    """A new series needs a panel, or a reason here why it has none."""
    elsewhere = {
        "finetune_train_learning_rate", "finetune_learning_rate", "finetune_grad_norm",  # the operator re-exports them
        "finetune_eval_score", "finetune_train_reward_margin", "finetune_train_reward_accuracy_ratio",
        "finetune_eval_reward_margin", "finetune_eval_reward_accuracy_ratio",
        "finetune_train_tokens_total", "finetune_train_progress_ratio", "finetune_train_last_step_timestamp_seconds",
        "finetune_checkpoint_bytes_total", "finetune_checkpoint_last_success_timestamp_seconds",
    }  # fmt: skip
    queried = {name for query in dashboard_queries() for name in queried_series(query)}
    trainers = {
        name
        for name in defined_series()
        if not name.startswith(("finetune_job_", "finetune_operator_", "process_", "python_"))
    }
    assert trainers - queried <= elsewhere


def test_panels_have_a_title_a_separate_position_and_the_chosen_data_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"


def test_steps_that_would_be_lost_are_shown_and_somebody_is_alerted(helm: str) -> None:
    (panel,) = [p for p in panels() if "finetune_job_steps_at_risk" in p["targets"][0]["expr"]]
    assert panel["title"] == "Steps at risk"
    (alert,) = [rule for rule in rules(helm) if rule.get("alert") == "FineTuneJobNotStored"]
    assert "finetune_job_steps_at_risk" in alert["annotations"]["description"]


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
                assert x < 24, panel["title"]


def test_the_chart_provides_the_dashboard_where_grafana_looks_for_it(helm: str) -> None:
    (config,) = [
        c for c in of_kind(render(helm, *EVERYTHING), "ConfigMap") if "grafana_dashboard" in c["metadata"]["labels"]
    ]
    assert json.loads(config["data"]["finetune-operator.json"]) == DASHBOARD


JOB = 'namespace="team", job="a"'
# alert → (series of 90 minutes, one sample a minute, that make it fire; the label of the alert)
FIRES: dict[str, dict[str, str]] = {
    "FineTuneJobFailed": {f'finetune_job_status_condition{{{JOB}, condition="Failed"}}': "1x90"},
    "FineTuneJobNoProgress": {
        f"finetune_job_step{{{JOB}}}": "7x90",
        f'finetune_job_phase{{{JOB}, phase="Running"}}': "1x90",
        f'finetune_job_trainer_phase{{{JOB}, phase="training"}}': "1x90",
    },
    "FineTuneJobCheckpointOld": {
        f"finetune_job_start_timestamp_seconds{{{JOB}}}": "-7200x90",
        f'finetune_job_phase{{{JOB}, phase="Running"}}': "1x90",
    },
    "FineTuneJobNotStored": {
        f'finetune_job_status_condition{{{JOB}, condition="CheckpointsStored"}}': "1x80 0x9",
        f'finetune_job_phase{{{JOB}, phase="Running"}}': "1x90",
    },
    "FineTuneJobGPUIdle": {f'finetune_gpu_utilization_ratio{{{JOB}, attempt="1", gpu="0"}}': "0.01x90"},
    "FineTuneJobGPUFault": {f'finetune_gpu_lost{{{JOB}, gpu="0", uuid="GPU-a"}}': "1x90"},
    "FineTuneJobGPUThrottled": {
        f'finetune_gpu_throttled{{{JOB}, gpu="0", uuid="GPU-a", reason="hardware_thermal"}}': "1x90"
    },
    "FineTuneJobStraggler": {f'finetune_train_straggler_ratio{{{JOB}, attempt="1"}}': "1.4x90"},
    "FineTuneJobRestartLoop": {f'finetune_job_restarts_total{{{JOB}, cause="application"}}': "0x70 6x20"},
    "FineTuneJobSkipsSteps": {
        f"finetune_job_skipped_steps{{{JOB}}}": "0x20 2x70",
        f'finetune_job_phase{{{JOB}, phase="Running"}}': "1x90",
    },
    "FineTuneJobWaitsLong": {f'finetune_job_phase{{{JOB}, phase="Pending"}}': "1x90"},
    "FineTuneJobNodeSilent": {f'finetune_job_reason{{{JOB}, reason="NodeSilent"}}': "1x90"},
    "FineTuneJobStalled": {
        f'finetune_job_status_condition{{{JOB}, condition="Stalled"}}': "1x90",
        f'finetune_job_status_condition{{{JOB}, condition="Failed"}}': "0x90",
    },
    "FineTuneOperatorDown": {},
    "FineTuneOperatorNoLeader": {'finetune_operator_leader{pod="a"}': "0x90"},
    "FineTuneOperatorSlow": {'finetune_operator_event_loop_lag_seconds{pod="a"}': "3x90"},
    "FineTuneOperatorRefused": {
        'finetune_operator_api_requests_total{verb="get", resource="jobs", code="403"}': "0+60x90",
        'finetune_operator_api_requests_total{verb="get", resource="jobs", code="200"}': "0+60x90",
    },
}
# The same series on a good day: nothing fires.
CALM = {
    f'finetune_job_status_condition{{{JOB}, condition="Failed"}}': "0x90",
    f'finetune_job_status_condition{{{JOB}, condition="CheckpointsStored"}}': "1x90",
    f"finetune_job_step{{{JOB}}}": "0+5x90",
    f'finetune_job_phase{{{JOB}, phase="Running"}}': "1x90",
    f'finetune_job_trainer_phase{{{JOB}, phase="training"}}': "1x90",
    f"finetune_job_skipped_steps{{{JOB}}}": "0x90",
    f"finetune_job_start_timestamp_seconds{{{JOB}}}": "0x90",
    f"finetune_job_checkpoint_timestamp_seconds{{{JOB}}}": "0+60x90",
    f'finetune_checkpoint_upload_failures_total{{{JOB}, attempt="1"}}': "0x90",
    f'finetune_gpu_utilization_ratio{{{JOB}, attempt="1", gpu="0"}}': "0.9x90",
    f'finetune_gpu_memory_total_bytes{{{JOB}, attempt="1", gpu="0"}}': "8e10x90",
    f'finetune_gpu_lost{{{JOB}, gpu="0", uuid="GPU-a"}}': "0x90",
    f'finetune_gpu_xid_errors_total{{{JOB}, gpu="0", uuid="GPU-a", xid="31"}}': "1x90",
    f'finetune_gpu_ecc_errors_total{{{JOB}, gpu="0", uuid="GPU-a", kind="uncorrected"}}': "5x90",
    f'finetune_gpu_ecc_errors_total{{{JOB}, gpu="0", uuid="GPU-a", kind="corrected"}}': "0+1x90",
    f'finetune_gpu_remapped_rows{{{JOB}, gpu="0", uuid="GPU-a", cause="pending"}}': "1x90",
    f'finetune_gpu_throttled{{{JOB}, gpu="0", uuid="GPU-a", reason="power_cap"}}': "1x90",
    f'finetune_train_straggler_ratio{{{JOB}, attempt="1"}}': "1x90",
    f'finetune_job_restarts_total{{{JOB}, cause="preemption"}}': "0+1x90",
    'finetune_operator_leader{pod="a"}': "1x90",
    'finetune_operator_leader{pod="b"}': "0x90",
    'finetune_operator_event_loop_lag_seconds{pod="a"}': "0x90",
    'finetune_operator_api_requests_total{verb="get", resource="jobs", code="200"}': "0+60x90",
}


def _promtool(folder: Path, helm: str, test: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is not installed; as root, `python3 -m localcluster packages` installs it (prometheus)"
    groups = [{"name": "all", "rules": rules(helm)}]
    (folder / "rules.yml").write_text(json.dumps({"groups": groups}))
    (folder / "test.yml").write_text(json.dumps({"rule_files": ["rules.yml"], "tests": [test]}))
    return subprocess.run([promtool, "test", "rules", "test.yml"], cwd=folder, text=True, capture_output=True)


def _series(series: dict[str, str]) -> list[dict[str, str]]:
    return [{"series": name, "values": values} for name, values in series.items()]


@pytest.mark.parametrize("alert", FIRES)
def test_an_alert_fires_when_it_should(alert: str, helm: str, tmp_path: Path) -> None:
    test = {
        "interval": "1m",
        "input_series": _series(FIRES[alert]),
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
                "eval_time": "85m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
        ],
    }
    done = _promtool(tmp_path, helm, test)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_fires_on_a_good_day(helm: str, tmp_path: Path) -> None:
    test = {
        "interval": "1m",
        "input_series": _series(CALM),
        "promql_expr_test": [
            {"expr": 'count(ALERTS{alertstate="firing"})', "eval_time": f"{minute}m"} for minute in (10, 45, 85)
        ],
    }
    done = _promtool(tmp_path, helm, test)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("phase", ["fetching", "loading", "evaluating", "uploading"])
def test_work_between_two_steps_is_not_a_lack_of_progress(phase: str, helm: str, tmp_path: Path) -> None:
    """Downloading weights of 140 GB takes longer than any alert waits."""
    busy = {f"finetune_job_step{{{JOB}}}": "0x90", f'finetune_job_trainer_phase{{{JOB}, phase="{phase}"}}': "1x90"}
    calm = {name: values for name, values in CALM.items() if "finetune_job_trainer_phase" not in name}
    test = {
        "interval": "1m",
        "input_series": _series(calm | busy),
        "promql_expr_test": [{"expr": 'count(ALERTS{alertstate="firing"})', "eval_time": "85m"}],
    }
    done = _promtool(tmp_path, helm, test)
    assert done.returncode == 0, done.stdout + done.stderr


_SLICE = {
    f'finetune_gpu_memory_total_bytes{{{JOB}, attempt="1", gpu="0", uuid="GPU-a"}}': "1e10x90",
    f'finetune_job_phase{{{JOB}, phase="Running"}}': "1x90",
}
_TOKENS = f'finetune_train_tokens_total{{{JOB}, attempt="1"}}'
MIG = {
    "downloads for long": ({}, 1),
    "trains": ({_TOKENS: "0+1000x90"}, 0),
    "hangs": ({_TOKENS: "1000x90", f'finetune_job_trainer_phase{{{JOB}, phase="training"}}': "1x90"}, 1),
    "answers test rows": ({_TOKENS: "1000x90", f'finetune_job_trainer_phase{{{JOB}, phase="evaluating"}}': "1x90"}, 0),
}


@pytest.mark.parametrize(("series", "alerts"), MIG.values(), ids=MIG)
def test_a_mig_slice_is_idle_if_no_token_is_trained_on(
    series: dict[str, str], alerts: int, helm: str, tmp_path: Path
) -> None:
    """NVML reports no utilization with MIG."""
    samples = [{"labels": "{}", "value": 1}] if alerts else []
    query = 'count(ALERTS{alertname="FineTuneJobGPUIdle", alertstate="firing"})'
    test = {
        "interval": "1m",
        "input_series": _series(_SLICE | series),
        "promql_expr_test": [{"expr": query, "eval_time": "85m", "exp_samples": samples}],
    }
    done = _promtool(tmp_path, helm, test)
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = {
    "Xid 79": f'finetune_gpu_xid_errors_total{{{JOB}, uuid="GPU-a", xid="79"}}',
    "a row that can't be replaced": f'finetune_gpu_remapped_rows{{{JOB}, uuid="GPU-a", cause="failed"}}',
}


@pytest.mark.parametrize("series", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_a_gpu_fires_by_any_of_its_signs(series: str, helm: str, tmp_path: Path) -> None:
    query = 'count(ALERTS{alertname="FineTuneJobGPUFault", alertstate="firing"})'
    test = {
        "interval": "1m",
        "input_series": _series({series: "1x90"}),
        "promql_expr_test": [{"expr": query, "eval_time": "85m", "exp_samples": [{"labels": "{}", "value": 1}]}],
    }
    done = _promtool(tmp_path, helm, test)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alert_and_the_verdict_take_the_same_xid_errors_for_a_programs(helm: str) -> None:
    (rule,) = (rule for rule in rules(helm) if rule["alert"] == "FineTuneJobGPUFault")
    (numbers,) = re.findall(r'xid!~"([0-9|]+)"', rule["expr"])
    assert {int(number) for number in numbers.split("|")} == {
        xid for xid in xids.KNOWN if xids.origin(xid) == "application"
    }


def test_every_alert_is_tested(helm: str) -> None:
    assert set(FIRES) == {rule["alert"] for rule in rules(helm)}


# A busy hour: two replicas of the operator; a job in its second attempt with two pods of two GPUs
# each; a job that waits, and one that failed.
_PODS = ("a-2-0", "a-2-1")
_POD = 'namespace="team", job="a", attempt="2"'
BUSY = CALM | {
    'finetune_job_phase{namespace="team", job="b", phase="Queued"}': "1x90",
    'finetune_job_phase{namespace="team", job="c", phase="Failed"}': "1x90",
    f"finetune_job_gpus{{{JOB}}}": "4x90",
    **{
        f"finetune_job_{name}{{{JOB}}}": "0.5x90"
        for name in ("train_loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "progress_ratio",
                     "eta_seconds", "train_reward_margin", "train_reward_accuracy_ratio", "eval_reward_margin",
                     "eval_reward_accuracy_ratio", "steps_at_risk")
    },
    f"finetune_train_loss{{{_POD}}}": "2-0.01x90",
    f'finetune_eval_loss{{{_POD}, split="validation"}}': "2x90",
    f'finetune_job_eval_score{{{JOB}, metric="rougeL", model="tuned"}}': "0.3x90",
    f'finetune_train_reward{{{_POD}, answer="chosen"}}': "0.3x90",
    f'finetune_train_log_probability{{{_POD}, answer="chosen"}}': "-30x90",
    f"finetune_train_steps_total{{{_POD}}}": "0+5x90",
    f"finetune_train_samples_total{{{_POD}}}": "0+80x90",
    f"finetune_train_padding_ratio{{{_POD}}}": "0.1x90",
    f'finetune_train_skipped_steps_total{{{_POD}, reason="NonFiniteLoss"}}': "0+1x90",
    f"finetune_train_loss_spikes_total{{{_POD}}}": "0+1x90",
    f"finetune_train_micro_batch_halvings{{{_POD}}}": "1x90",
    f"finetune_checkpoint_stall_seconds_total{{{_POD}}}": "0+1x90",
    **{
        f'finetune_train_step_duration_seconds_{part}{{{_POD}, phase="{phase}"}}': "0+5x90"
        for part in ("sum", "count") for phase in ("data", "forward", "backward", "optimizer", "total")
    },
    **{
        f'finetune_train_step_duration_seconds_bucket{{{_POD}, phase="total", le="{le}"}}': f"0+{count}x90"
        for le, count in (("1", 3), ("10", 5), ("+Inf", 5))
    },
    **{f'finetune_phase_seconds_total{{{_POD}, pod="{pod}", phase="training"}}': "0+60x90" for pod in _PODS},
    **{
        f'finetune_gpu_{name}{{{_POD}, pod="{pod}", gpu="{gpu}"}}': "0.5x90"
        for name in ("utilization_ratio", "memory_used_bytes", "memory_total_bytes", "power_watts",
                     "temperature_celsius", "sm_clock_hertz", "lost")
        for pod in _PODS for gpu in (0, 1)
    },
    f'finetune_gpu_throttled{{{_POD}, gpu="0", reason="power_cap"}}': "1x90",
    f'finetune_gpu_pcie_bytes_per_second{{{_POD}, gpu="0", direction="tx"}}': "1x90",
    f'finetune_gpu_nvlink_bytes_total{{{_POD}, gpu="0", direction="tx"}}': "0+9x90",
    f'finetune_gpu_ecc_errors_total{{{_POD}, gpu="0", kind="corrected"}}': "1x90",
    f'finetune_gpu_remapped_rows{{{_POD}, gpu="0", cause="pending"}}': "1x90",
    f'finetune_gpu_xid_errors_total{{{_POD}, gpu="0", xid="31"}}': "1x90",
    **{
        f"finetune_{name}{{{_POD}}}": "1x90"
        for name in ("train_slowest_rank_seconds", "train_fastest_rank_seconds", "train_slowest_rank",
                     "train_straggler_ratio", "network_bytes_per_second", "train_tokens_per_second_per_gpu",
                     "train_mfu_ratio")
    },
    f'finetune_checkpoint_duration_seconds{{{_POD}, tier="remote"}}': "3x90",
    'finetune_operator_reconcile_total{pod="a", result="done"}': "0+9x90",
    **{
        f'finetune_operator_{name}_bucket{{pod="a", le="{le}"}}': "0+9x90"
        for name in ("reconcile_duration_seconds", "queue_wait_seconds") for le in ("0.1", "+Inf")
    },
    'finetune_operator_queue_depth{pod="a"}': "0x90",
    'finetune_operator_cache_objects{pod="a", resource="jobs"}': "3x90",
    'finetune_operator_progress_posts_total{pod="a", code="200"}': "0+12x90",
    'finetune_operator_last_sweep_timestamp_seconds{pod="a"}': "0+60x90",
    **{f'process_resident_memory_bytes{{pod="{pod}"}}': "7e7x90" for pod in ("a", "b")},
}  # fmt: skip


@pytest.mark.parametrize("query", dashboard_queries())
def test_a_query_of_the_dashboard_answers_on_a_busy_day(query: str, helm: str, tmp_path: Path) -> None:
    """promtool expects an empty answer, and reports what it got instead."""
    expected = [{"expr": without_variables(query), "eval_time": "60m"}]
    done = _promtool(tmp_path, helm, {"interval": "1m", "input_series": _series(BUSY), "promql_expr_test": expected})
    assert re.search(r"exp:\s*nil\s*got:\s*\S*\{?.*\d", done.stdout + done.stderr, re.DOTALL), done.stdout + done.stderr
    assert "error" not in done.stderr.lower().replace("_errors_total", "")
