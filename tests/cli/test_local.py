"""How a job is planned for this machine: paths, processes and identity. The plan is a pure
function, so tables suffice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages.run import ProgressConfig, S3Config
from finetune_api.resource import FineTuneJob, parse
from finetune_api.yaml import load
from finetune_cli.local import CannotRunHere, LocalRun, Machine, Overrides, Workspace, local_run

ROOT = Path(__file__).parents[2]
AS_WRITTEN = Overrides()
CPU = Machine(cores=2, gpus=0, free_port=12345)


def job(name: str = "quickstart", **spec: Any) -> FineTuneJob:
    body = load((ROOT / "examples" / f"{name}.yaml").read_text())
    return parse({**body, "spec": {**body["spec"], **spec}})


def planned(job: FineTuneJob, overrides: Overrides = AS_WRITTEN, machine: Machine = CPU) -> LocalRun:
    workspace = Workspace(
        folder=Path("/home/user"),
        scratch_root=Path("/scratch"),
        progress=ProgressConfig(url="http://127.0.0.1:1/v1/progress", token_path="/t"),
        s3=S3Config(),
    )
    return local_run(job, overrides, machine, workspace)


def test_paths_replace_uris_and_the_default_output_is_in_this_folder() -> None:
    config = planned(job(), Overrides(model="m", dataset="/d/train.jsonl", test="~nobody/t")).config
    assert config.model.location.uri == "file:///home/user/m"
    assert config.data.train.uri == "file:///d/train.jsonl"
    assert config.output.uri == "file:///home/user/quickstart-output"
    assert config.output.display == "/home/user/quickstart-output"


def test_the_date_of_a_template_is_that_of_the_job_or_of_today() -> None:
    today = Machine(cores=2, gpus=0, free_port=1, today="2026-11-30")
    created = job().model_copy(update={"metadata": job().metadata.model_copy(
        update={"creation_timestamp": "2026-11-28T23:59:59Z"})})  # fmt: skip
    dated = job(dataset={"uri": "s3://data/train.jsonl", "rendering": {"date": "2026-01-31"}}, evaluation={})
    dates = [planned(spec, machine=today).config.data.rendering.date for spec in (job(), created, dated)]
    assert dates == ["2026-11-30", "2026-11-28", "2026-01-31"]


@pytest.mark.parametrize("end", ["", "/"])
def test_a_folder_of_rows_may_replace_a_uri(end: str, tmp_path: Path) -> None:
    config = planned(job(), Overrides(dataset=f"{tmp_path}{end}", model=f"{tmp_path}{end}")).config
    assert config.data.train.uri == f"file://{tmp_path}/"
    assert config.model.location.uri == f"file://{tmp_path}"


@pytest.mark.parametrize(
    ("objective", "format", "expected"),
    [("dpo", "auto", "preference"), ("supervised", "auto", "auto"), ("dpo", "messages", "messages")],
)
def test_the_objective_decides_how_rows_are_read(objective: str, format: str, expected: str) -> None:
    training = {"objective": objective, "maxSteps": 1, "globalBatchSize": 4, "learningRate": 1e-3}
    dataset = {"uri": "s3://data/train.jsonl", "format": format}
    data = planned(job(training=training, dataset=dataset, evaluation={})).config.data
    assert (data.format, data.sources_of("train")[0].format) == (expected, expected)


def test_a_uri_may_replace_a_uri() -> None:
    assert planned(job(), Overrides(model="hf://owner/name")).config.model.location.uri == "hf://owner/name"


def test_validation_rows_replace_the_held_out_share() -> None:
    config = planned(job(), Overrides(validation="v.jsonl")).config
    assert config.data.validation is not None
    assert config.data.validation_fraction is None
    assert planned(job()).config.data.validation_fraction == 0.05


def test_as_many_processes_as_cores_share_the_same_batch() -> None:
    run = planned(job())
    assert (run.config.world.nodes, run.config.world.size, run.config.world.threads_per_process) == (1, 2, 1)
    assert run.config.training.global_batch_size == 16
    assert "2 processes instead of 4; the global batch size is unchanged" in run.notes
    assert planned(job(), Overrides(processes=1)).config.world.threads_per_process == 2


def test_as_many_processes_share_rows_as_divide_those_of_this_machine() -> None:
    shared = job(distribution={"processesPerNode": 4, "sequenceParallelSize": 4})
    run = planned(shared)
    assert (run.config.world.size, run.config.world.sequence_parallel_size) == (2, 2)
    assert "distribution.sequenceParallelSize: 2 instead of 4; losses are unchanged" in run.notes
    assert planned(shared, Overrides(processes=3)).config.world.sequence_parallel_size == 1


def test_a_job_for_gpus_trains_on_the_cpu_if_there_is_no_gpu() -> None:
    gpu = job(resources={"gpu": {}})
    here = planned(gpu)
    assert here.config.world.device == "cpu"
    assert any("this machine has no GPU" in note for note in here.notes)
    there = planned(gpu, machine=Machine(cores=8, gpus=1, free_port=1))
    assert (there.config.world.device, there.config.world.size) == ("cuda", 1)
    with pytest.raises(CannotRunHere, match="give at most 1, the number of GPUs"):
        planned(gpu, Overrides(processes=2), Machine(cores=8, gpus=1, free_port=1))


def test_a_volume_needs_a_path() -> None:
    with pytest.raises(CannotRunHere, match="give --model PATH"):
        planned(job("volume"))


def test_secrets_are_not_read_and_the_user_is_informed() -> None:
    run = planned(job())
    assert run.config.model.location.credentials is None
    assert any("AWS_*" in note for note in run.notes)


def test_the_same_recipe_and_paths_are_the_same_run_and_a_change_is_another() -> None:
    first = planned(job()).config.job.uid
    assert planned(job(), Overrides(processes=1)).config.job.uid == first
    assert planned(job(runPolicy={"stallSeconds": 5})).config.job.uid == first
    assert planned(job(training={"maxSteps": 17})).config.job.uid != first
    assert planned(job(), Overrides(output="elsewhere")).config.job.uid != first


def test_the_scratch_limit_of_a_pod_does_not_hold_on_this_machine() -> None:
    """A pod with this limit would be refused the model."""
    assert planned(job(resources={"scratch": "1Mi"})).config.scratch_bytes is None
