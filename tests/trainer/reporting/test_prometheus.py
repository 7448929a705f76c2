"""What Prometheus gets from a trainer pod: scraped over HTTP from a real supervisor and read by a
real parser, with GPUs from the real NVML binding on a fake library."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fake_gpu import build_nvml
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return JobSetup(tmp_path).write_inputs().with_changes(metrics_port=port)


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nvml(tmp_path_factory.mktemp("nvml"))


def scrape(setup: JobSetup) -> Series:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{setup.changes['metrics_port']}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    shared = ("namespace", "job", "attempt")
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k not in shared))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("namespace") == "ns" and sample.labels.get("job") == "job"
    }


def value(series: Series, name: str, **labels: str) -> float | None:
    return series.get((name, tuple(sorted(labels.items()))))


def test_losses_counters_and_times_are_served_while_it_trains(setup: JobSetup) -> None:
    hold = {"hold": str(setup.folder / "go"), "hold_at": 3}
    running = supervisor_process.start(setup.run(), setup.folder, behavior=hold)
    supervisor_process.wait_until(lambda: value(scrape(setup), "finetune_train_steps_total") == 3)
    series = scrape(setup)
    assert value(series, "finetune_train_loss") == 1.0
    assert value(series, "finetune_eval_loss", split="test") == 4.0
    assert value(series, "finetune_eval_loss", split="validation") is None
    assert value(series, "finetune_learning_rate") == 1e-3
    # A counter that appeared with its first event would hide that event from increase().
    assert value(series, "finetune_checkpoint_upload_failures_total") == 0
    assert value(series, "finetune_train_loss_spikes_total") == 0
    assert value(series, "finetune_grad_norm") == 0.5
    assert value(series, "finetune_train_tokens_total") == 300
    assert value(series, "finetune_train_samples_total") == 24
    assert value(series, "finetune_train_progress_ratio") == 0.75
    assert value(series, "finetune_train_step_duration_seconds_count", phase="forward") == 3
    assert value(series, "finetune_checkpoint_bytes_total", tier="local") == 1050
    assert value(series, "finetune_checkpoint_stall_seconds_total") == 0.005
    assert value(series, "finetune_train_skipped_steps_total", reason="NonFiniteLoss") == 0
    supervisor_process.wait_until(
        lambda: value(scrape(setup), "finetune_checkpoint_bytes_total", tier="remote") == 1050
    )
    assert value(scrape(setup), "finetune_checkpoint_last_success_timestamp_seconds", tier="remote") is not None
    assert value(series, "finetune_phase_seconds_total", phase="fetching") is not None
    assert not any(name.startswith("finetune_gpu") for name, _ in series)
    (setup.folder / "go").touch()
    assert running.wait().code == 0


def test_no_label_holds_a_step_a_uri_or_a_uid(setup: JobSetup) -> None:
    hold = {"hold": str(setup.folder / "go"), "hold_at": 2}
    running = supervisor_process.start(setup.run(), setup.folder, behavior=hold)
    supervisor_process.wait_until(lambda: value(scrape(setup), "finetune_train_steps_total") == 2)
    labels = {label for _, pairs in scrape(setup) for label in pairs}
    assert {name for name, _ in labels} <= {"split", "phase", "tier", "gpu", "uuid", "le", "reason"}
    assert not any("uid-1" in text or "://" in text for _, text in labels)
    running.terminate()
    running.wait()


def test_metrics_survive_a_killed_rank_and_linger_for_the_last_scrape(setup: JobSetup) -> None:
    behavior = {"steps": 100, "at_step": 4, "then": "kill"}
    running = supervisor_process.start(
        setup.with_changes(metrics_linger_seconds=20.0).run(), setup.folder, behavior=behavior
    )
    supervisor_process.wait_until(lambda: (setup.folder / "termination").exists())
    assert value(scrape(setup), "finetune_train_loss") == 1.0
    running.terminate()
    ended = running.wait(timeout=10)
    assert (ended.code, ended.last.reason) == (72, "RankKilled")


def test_a_gpu_is_reported_by_the_real_binding(setup: JobSetup, nvml: Path) -> None:
    gpus = setup.folder / "gpus"
    gpus.write_text("87 1000 80000\n- 5 10\n")
    environment = {"LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_FILE": str(gpus)}
    hold = {"hold": str(setup.folder / "go"), "hold_at": 1}
    running = supervisor_process.start(setup.run(), setup.folder, behavior=hold, environment=environment)
    supervisor_process.wait_until(lambda: value(scrape(setup), "finetune_train_steps_total") == 1)
    series = scrape(setup)
    assert value(series, "finetune_gpu_utilization_ratio", gpu="0", uuid="GPU-fake-0") == 0.87
    assert value(series, "finetune_gpu_memory_used_bytes", gpu="0", uuid="GPU-fake-0") == 1000
    assert value(series, "finetune_gpu_memory_total_bytes", gpu="0", uuid="GPU-fake-0") == 80000
    assert value(series, "finetune_gpu_utilization_ratio", gpu="1", uuid="GPU-fake-1") is None
    assert value(series, "finetune_gpu_memory_used_bytes", gpu="1", uuid="GPU-fake-1") == 5
    gpus.write_text("12 2000 80000\n- 5 10\n")
    assert value(scrape(setup), "finetune_gpu_utilization_ratio", gpu="0", uuid="GPU-fake-0") == 0.12
    running.terminate()
    running.wait()


def test_a_node_that_does_not_lead_serves_its_gpus_but_no_training_series(setup: JobSetup, nvml: Path) -> None:
    gpus = setup.folder / "gpus"
    gpus.write_text("50 1 2\n")
    environment = {"LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_FILE": str(gpus)}
    run = setup.with_changes(world=setup.run().world.model_copy(update={"nodes": 2})).run()
    hold = {"hold": str(setup.folder / "go"), "hold_at": 1}
    running = supervisor_process.start(run, setup.folder, behavior=hold, node=1, environment=environment)
    supervisor_process.wait_until(
        lambda: value(scrape(setup), "finetune_gpu_utilization_ratio", gpu="0", uuid="GPU-fake-0") == 0.5
    )
    assert not any(name.startswith("finetune_train") for name, _ in scrape(setup))
    running.terminate()
    assert running.wait().code == 143
