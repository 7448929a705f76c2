"""A GPU that fails is reported as the cause, with its name; it is the infrastructure's fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_gpu import build_nvml
from finetune_api.reasons import cause
from trainer.support import supervisor_process
from trainer.support.supervisor_process import FinishedSupervisor, JobSetup


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nvml(tmp_path_factory.mktemp("nvml"))


def _ended(folder: Path, nvml: Path, then: str, *faults: str) -> FinishedSupervisor:
    """Returns the end of a supervisor whose rank 1 fails, and whose GPUs have had these faults
    since its start."""
    setup = JobSetup(folder).write_inputs()
    (folder / "gpus").write_text("80 1000 80000\n80 1000 80000\n")
    (folder / "faults").write_text("")
    environment = {
        "LD_LIBRARY_PATH": str(nvml),
        "FAKE_NVML_FILE": str(folder / "gpus"),
        "FAKE_NVML_FAULTS": str(folder / "faults"),
    }
    behavior = {"at_step": 2, "then": then, "on_rank": 1, "hold": str(folder / "go"), "hold_at": 1}
    running = supervisor_process.start(setup.run(), folder, behavior=behavior, environment=environment)
    events = folder / "scratch/events/rank-0.jsonl"
    supervisor_process.wait_until(lambda: events.exists() and '"type":"step"' in events.read_text(), 60)
    (folder / "faults").write_text("".join(f"{fault}\n" for fault in faults))
    (folder / "go").touch()
    return running.wait()


@pytest.mark.parametrize("then", ["exit", "abort"])
def test_an_xid_error_is_the_cause_of_what_a_rank_reports(tmp_path: Path, nvml: Path, then: str) -> None:
    ended = _ended(tmp_path, nvml, then, "xid 0 31", "xid 1 79")
    assert (ended.code, ended.last.reason) == (80, "GpuFault")
    assert ended.last.message.startswith("GPU 1 (GPU-fake-1) reported Xid 79 (GPU has fallen off the bus). ")
    assert "Xid 31" not in ended.last.message
    assert cause("GpuFault") == "infrastructure"


def test_a_lost_gpu_is_the_cause(tmp_path: Path, nvml: Path) -> None:
    ended = _ended(tmp_path, nvml, "abort", "lost 1 1")
    assert (ended.last.reason, ended.last.rank) == ("GpuFault", 1)
    assert "GPU 1 (GPU-fake-1) is lost" in ended.last.message


def test_healthy_gpus_and_errors_of_programs_explain_nothing(tmp_path: Path, nvml: Path) -> None:
    assert _ended(tmp_path, nvml, "abort", "xid 1 31", "corrected 1 3").last.reason == "TrainingError"


def test_a_lack_of_memory_remains_one_although_a_gpu_failed(tmp_path: Path, nvml: Path) -> None:
    assert _ended(tmp_path, nvml, "memory", "xid 1 79").last.reason == "OutOfMemory"
