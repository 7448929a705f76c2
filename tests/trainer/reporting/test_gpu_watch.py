"""What the supervisor knows of its GPUs: the real NVML binding on a fake library that is as strict
as NVML, in a process of its own for each library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_gpu import build_nvml
from finetune_trainer.reporting.gpus import xids

_ROOT = Path(__file__).parents[3]
_SCRAPE = """
import json, sys, time
from pathlib import Path
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client import generate_latest
from finetune_trainer.reporting.gpus.collector import GpuCollector
from finetune_trainer.reporting.gpus.watch import Gpus
facts = Path(sys.argv[1])
gpus = Gpus()
registry = CollectorRegistry()
registry.register(GpuCollector(gpus, {"job": "j"}))
for later in sys.argv[2:]:
    facts.write_text(facts.read_text() + later)
began = time.monotonic()
faults = gpus.faults()
text = generate_latest(registry).decode()
series = {}
for family in text_string_to_metric_families(text):
    for sample in family.samples:
        labels = ",".join(v for k, v in sorted(sample.labels.items()) if k != "job")
        series[f"{sample.name}[{labels}]"] = sample.value
print(json.dumps({"faults": faults, "series": series, "seconds": time.monotonic() - began}))
"""
Observe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def observe(tmp_path: Path, nvml: Path) -> Observe:
    """Returns faults and series of GPUs, given their facts before the watch begins and after."""

    def observed(facts: str, *later: str, gpus: str = "80 700 7000\n", library: Path = nvml) -> dict[str, Any]:
        (tmp_path / "gpus").write_text(gpus)
        (tmp_path / "facts").write_text(facts)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{_ROOT / 'trainer_image'}:{_ROOT / 'operator'}",
            "LD_LIBRARY_PATH": str(library),
            "FAKE_NVML_FILE": str(tmp_path / "gpus"),
            "FAKE_NVML_FAULTS": str(tmp_path / "facts"),
        }
        command = [sys.executable, "-c", _SCRAPE, str(tmp_path / "facts"), *later]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        values: dict[str, Any] = json.loads(done.stdout)
        return values

    return observed


FULL = """power 0 412500
temperature 0 71
clock 0 1755
throttle 0 68
pcie-tx 0 2000
pcie-rx 0 3000
nvlink-tx 0 5
nvlink-rx 0 6
corrected 0 4
ecc 0 1
rows-corrected 0 2
rows-pending 0 1
"""


def test_every_figure_has_its_unit_and_the_uuid_that_dcgm_uses(observe: Observe) -> None:
    series = observe(FULL, "xid 0 31\n")["series"]
    gpu = "0,GPU-fake-0"
    assert series[f"finetune_gpu_utilization_ratio[{gpu}]"] == 0.8
    assert series[f"finetune_gpu_power_watts[{gpu}]"] == 412.5
    assert series[f"finetune_gpu_temperature_celsius[{gpu}]"] == 71
    assert series[f"finetune_gpu_sm_clock_hertz[{gpu}]"] == 1755e6
    assert series["finetune_gpu_pcie_bytes_per_second[tx,0,GPU-fake-0]"] == 2e6
    assert series["finetune_gpu_nvlink_bytes_total[rx,0,GPU-fake-0]"] == 6 * 1024
    assert series["finetune_gpu_ecc_errors_total[0,corrected,GPU-fake-0]"] == 4
    assert series["finetune_gpu_ecc_errors_total[0,uncorrected,GPU-fake-0]"] == 1
    assert series["finetune_gpu_remapped_rows[correctable,0,GPU-fake-0]"] == 2
    assert series["finetune_gpu_remapped_rows[pending,0,GPU-fake-0]"] == 1
    assert series["finetune_gpu_xid_errors_total[0,GPU-fake-0,31]"] == 1
    assert series[f"finetune_gpu_lost[{gpu}]"] == 0
    reasons = {name: value for name, value in series.items() if name.startswith("finetune_gpu_throttled")}
    active = {name for name, value in reasons.items() if value}
    assert len(reasons) == 6
    assert active == {
        "finetune_gpu_throttled[0,power_cap,GPU-fake-0]",
        "finetune_gpu_throttled[0,hardware_thermal,GPU-fake-0]",
    }


def test_what_a_card_does_not_support_has_no_series(observe: Observe) -> None:
    names = {name.partition("[")[0] for name in observe("no-ecc 0 1\n", gpus="- - -\n")["series"]}
    assert names == {"finetune_gpu_lost"}


def test_a_mig_slice_has_its_own_memory_and_the_uuid_of_its_gpu_but_no_utilization(observe: Observe) -> None:
    observed = observe("mig 0 1\npower 0 100000\n", "xid 0 94\n")
    series = observed["series"]
    assert series["finetune_gpu_memory_total_bytes[0,GPU-fake-0]"] == 1000
    assert series["finetune_gpu_power_watts[0,GPU-fake-0]"] == 100
    assert not any(name.startswith("finetune_gpu_utilization_ratio") for name in series)
    (fault,) = observed["faults"]
    assert fault.startswith("GPU 0 (MIG-fake-0-0 of GPU-fake-0) reported Xid 94 (contained memory error")


def test_a_fault_names_the_gpu_and_the_meaning_of_its_xid(observe: Observe) -> None:
    faults = observe("", "xid 1 79\nxid 0 13\nxid 0 999\n", gpus="1 1 2\n1 1 2\n")["faults"]
    assert faults == [
        "GPU 1 (GPU-fake-1) reported Xid 79 (GPU has fallen off the bus)",
        "GPU 0 (GPU-fake-0) reported Xid 999",
    ]


def test_errors_of_memory_count_from_the_start_of_the_pod(observe: Observe) -> None:
    before = "ecc 0 7\nrows-failed 0 1\n"
    assert observe(before)["faults"] == []
    assert observe("", "ecc 0 8\nrows-failed 0 1\n")["faults"] == [
        "GPU 0 (GPU-fake-0) had memory errors that ECC couldn't correct",
        "GPU 0 (GPU-fake-0) has a defective memory row that can't be replaced",
    ]


def test_a_lost_gpu_keeps_its_name(observe: Observe) -> None:
    observed = observe("power 1 1000\n", "lost 1 1\n", gpus="1 1 2\n1 1 2\n")
    assert observed["faults"] == ["GPU 1 (GPU-fake-1) is lost"]
    assert observed["series"]["finetune_gpu_lost[1,GPU-fake-1]"] == 1
    assert "finetune_gpu_power_watts[1,GPU-fake-1]" not in observed["series"]


@pytest.mark.parametrize(
    ("code", "failure"),
    [(28, "is gone"), (16, "needs a reset"), (9, "has lost its driver, which is no longer loaded"),
     (18, "has another driver than when the pod started"), (999, ""), (4, "")],
    ids=["not found", "reset required", "driver not loaded", "driver replaced", "unknown", "no permission"],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_any_more_says_why(observe: Observe, code: int, failure: str) -> None:
    """The numbers are NVML's return codes. Others say nothing about the health of a GPU."""
    observed = observe("", f"fails 1 {code}\n", gpus="1 1 2\n1 1 2\n")
    assert observed["faults"] == ([f"GPU 1 (GPU-fake-1) {failure}"] if failure else [])
    assert observed["series"]["finetune_gpu_lost[1,GPU-fake-1]"] == bool(failure)


def test_a_gpu_that_was_lost_before_the_pod_started_does_not_hide_the_others(observe: Observe) -> None:
    observed = observe("lost 0 1\n", gpus="1 1 2\n50 1 2\n")
    assert observed["faults"] == ["GPU 0 is lost"]
    assert observed["series"]["finetune_gpu_utilization_ratio[1,GPU-fake-1]"] == 0.5


def test_an_older_driver_has_the_function_by_its_old_name(observe: Observe, tmp_path: Path) -> None:
    library = build_nvml(tmp_path / "old", old_driver=True)
    series = observe(FULL, library=library)["series"]
    assert series["finetune_gpu_throttled[0,power_cap,GPU-fake-0]"] == 1


@pytest.mark.parametrize("facts", ["mismatch -1 1\n"], ids=["library and kernel module differ"])
def test_a_driver_that_cannot_be_used_means_no_series(observe: Observe, facts: str) -> None:
    assert observe(facts)["series"] == {}


def test_a_driver_that_hangs_blocks_nobody(observe: Observe) -> None:
    observed = observe("", "hangs 0 30\n")
    assert observed["seconds"] < 15
    assert observed["faults"] == []


def test_xids_of_programs_are_those_of_nvidias_device_plugin() -> None:
    assert {xid for xid in xids.KNOWN if xids.origin(xid) == "application"} == {13, 31, 43, 45, 68, 109}
    assert {xids.origin(xid) for xid in (48, 63, 64, 74, 79, 94, 95, 12345)} == {"hardware"}
