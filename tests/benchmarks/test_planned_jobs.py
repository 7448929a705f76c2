"""What `finetune plan` says of the jobs in examples/gpus, run as a user runs it: the command in the
comment of each file, on a folder with the shapes of the published model."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.gpu.planned_jobs import JOBS, PlannedJob, planned_jobs

from finetune_cli.main import main
from finetune_trainer.parallel import model_size
from sizing import folders
from sizing.models import MODELS, PublishedModel, tensor_shapes

_CHOSEN = {
    "full-3b-8h100": "fsdp",
    "full-70b-4x8h100": "fsdp, activations recomputed",
    "full-8b-4x8h100": "fsdp within each of 4 nodes",
    "full-8b-8h100": "fsdp",
    "lora-8b-4090": "ddp, activations recomputed except attention",
    "lora-8b-8h100": "ddp",
    "lora-8b-a10g-spot": "ddp, activations recomputed",
    "lora-8b-mig": "ddp",
    "qlora-70b-8h100": "fsdp, activations of 25% of the layers recomputed",
    "qlora-8b-4090": "ddp",
}


@pytest.fixture(scope="module")
def by_name() -> dict[str, PlannedJob]:
    return {job.name: job for job in planned_jobs()}


def test_there_is_an_answer_for_every_job(by_name: dict[str, PlannedJob]) -> None:
    assert set(by_name) == set(_CHOSEN)


@pytest.mark.parametrize("name", _CHOSEN)
def test_plan_chooses(name: str, by_name: dict[str, PlannedJob]) -> None:
    job = by_name[name]
    assert f"finetune plan examples/gpus/{name}.yaml" in job.command
    assert job.chosen == _CHOSEN[name]
    assert job.tokens >= 2048
    assert "GiB" in job.reason or "estimated to be faster than" in job.reason


def test_several_slices_in_a_pod_are_refused_with_the_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.yaml"
    job.write_text((JOBS / "lora-8b-mig.yaml").read_text().replace("processesPerNode: 1", "processesPerNode: 2"))
    assert main(["plan", str(job)]) == 1
    assert "spec.distribution.processesPerNode" in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_folder_with_the_shapes_of_a_model_takes_no_space(model: PublishedModel, tmp_path: Path) -> None:
    folder = folders.write(model, tmp_path / "model")
    assert (
        model_size.read(folder, None).parameters
        == model_size.size_of(model.config, tensor_shapes(model), None).parameters
    )
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 2**20
