"""A job that starts from another one's checkpoint or adapter: what is refused by a table, and real
ranks on a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file

from finetune_api.messages.manifest import Manifest
from finetune_api.messages.run import CheckpointSpec, JobRef, RunConfig, StartConfig
from finetune_api.resource import DpoSpec, LoraSpec, TrainingSpec
from finetune_trainer.errors import RunError
from finetune_trainer.storage import base, bounds
from finetune_trainer.supervisor.start import origin
from finetune_trainer.supervisor.start.compatibility import differences
from testkit.rows import pairs
from trainer.support import supervisor_process
from trainer.support.supervisor_process import FinishedSupervisor, JobSetup

STEPS = 8
RECIPE: dict[str, Any] = {
    "max_steps": STEPS, "global_batch_size": 4, "learning_rate": 1e-2, "scheduler": "cosine", "eval_every_steps": 3,
}  # fmt: skip


def start_from(folder: Path, use: str = "trainingState", step: int | None = None) -> StartConfig:
    return StartConfig(location=supervisor_process.location(f"file://{folder}"), step=step, use=use)  # type: ignore[arg-type]


def with_start(run: RunConfig, start: StartConfig) -> RunConfig:
    return run.model_copy(update={"model": run.model.model_copy(update={"checkpoint": start})})


# -- what fits -----------------------------------------------------------------------------------


def setup_of(tmp_path: Path, **changes: Any) -> JobSetup:
    training = TrainingSpec(**{**RECIPE, **changes.pop("training", {})})
    return JobSetup(tmp_path).with_changes(**{"training": training, "lora": LoraSpec(rank=4), **changes})


def provenance(run: RunConfig, digest: str | None = "sha256:base") -> dict[str, Any]:
    configuration = run.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"model": {"uri": run.model.location.display, "digest": digest}, "configuration": configuration}


def seed(value: int) -> dict[str, Any]:
    return {"training": {"seed": value}}


# (what the new job has otherwise, the use, what a clause says or None)
FITS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "the same recipe": ({}, "trainingState", None),
    "more steps, and another schedule": (
        {"training": {"max_steps": 20, "learning_rate": 1e-4, "scheduler": "linear"}}, "trainingState", None),
    "evaluated more often": ({"training": {"eval_every_steps": 1}}, "trainingState", None),
    "other micro-batches": ({"training": {"micro_batch_size": 1}}, "trainingState", None),
    "another seed": (seed(7), "trainingState", "training.seed was 42 there and is 7 here"),
    "another batch size": ({"training": {"global_batch_size": 8}}, "trainingState", "training.globalBatchSize was 4"),
    "another optimizer": ({"training": {"optimizer": "adafactor"}}, "trainingState", "training.optimizer was 'adamw'"),
    "another rank": ({"lora": LoraSpec(rank=8)}, "trainingState", "method.lora.rank was 4 there and is 8 here"),
    "another rank, weights": ({"lora": LoraSpec(rank=8)}, "weights", "method.lora.rank was 4 there and is 8 here"),
    "another alpha, weights": ({"lora": LoraSpec(rank=4, alpha=8)}, "weights", "method.lora.alpha was 32"),
    "other modules, weights": (
        {"lora": LoraSpec(rank=4, target_modules=("q_proj",))}, "weights", "method.lora.targetModules was"),
    "another dropout, weights": ({"lora": LoraSpec(rank=4, dropout=0.3)}, "weights", None),
    "another seed, weights": (seed(7), "weights", None),
    "full training": ({"method": "full", "lora": None}, "weights", "method.type was 'lora' there and is 'full' here"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "use", "clause"), FITS.values(), ids=FITS)
def test_what_must_be_the_same(changes: dict[str, Any], use: str, clause: str | None, tmp_path: Path) -> None:
    theirs = provenance(setup_of(tmp_path).run())
    own = with_start(setup_of(tmp_path, **changes).run(), start_from(tmp_path, use))
    clauses = differences(theirs, own, "sha256:base")
    assert (clauses == ()) == (clause is None), clauses
    assert clause is None or any(clause in one for one in clauses)


def test_bases_are_compared_by_their_files_once_these_are_there(tmp_path: Path) -> None:
    run = setup_of(tmp_path).run()
    own = with_start(run, start_from(tmp_path))
    assert differences(provenance(run), own, None) == ()
    assert "has other files than" in differences(provenance(run), own, "sha256:other")[0]
    elsewhere = provenance(run)
    elsewhere["model"]["uri"] = "hf://mirror/base"
    assert differences(elsewhere, own, "sha256:base") == ()
    assert (
        "model.uri was 'hf://mirror/base'"
        in differences({**elsewhere, "model": {"uri": "hf://mirror/base"}}, own, None)[0]
    )


def test_a_checkpoint_that_says_nothing_of_its_recipe_is_refused(tmp_path: Path) -> None:
    own = with_start(setup_of(tmp_path).run(), start_from(tmp_path))
    assert "an older trainer has written it" in differences({}, own, None)[0]


def test_a_field_that_the_other_version_did_not_have_was_at_its_default(tmp_path: Path) -> None:
    theirs, run = provenance(setup_of(tmp_path).run()), setup_of(tmp_path).run()
    for section, field in (("lora", "rankStabilized"), ("training", "groupByLength"), ("data", "packing")):
        del theirs["configuration"][section][field]
    assert differences(theirs, with_start(run, start_from(tmp_path)), None) == ()
    other = setup_of(tmp_path, training={"group_by_length": True}).run()
    assert "training.groupByLength" in differences(theirs, with_start(other, start_from(tmp_path)), None)[0]


def test_dpo_from_weights_cant_be_continued_as_its_reference_is_elsewhere(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, training={"objective": "dpo", "dpo": DpoSpec()})
    theirs = provenance(with_start(setup.run(), start_from(tmp_path, "weights")))
    assert "its reference model" in differences(theirs, with_start(setup.run(), start_from(tmp_path)), None)[0]


def test_every_role_of_a_folder_has_its_field_and_its_reasons() -> None:
    roles = set(get_args(base.Role))
    assert roles == set(base.FIELD) == set(base.NOT_FOUND) == set(bounds.INVALID)


# -- real runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """The output folders of a job that was stopped, of the same job undisturbed, and of one that
    continues the first, with the end of that one."""

    stopped: Path
    undisturbed: Path
    continued: Path
    end: FinishedSupervisor


def job(folder: Path, model: Path, name: str, **changes: Any) -> JobSetup:
    """A job of its own name and uid, whose rows and output are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changes.pop("rows", pairs(21))))
    defaults: dict[str, Any] = {
        "job": JobRef(namespace="ns", name=name, uid=f"uid-{name}", attempt=1),
        "world": JobSetup(folder).run().world.model_copy(update={"processes_per_node": 1}),
        "checkpoint": CheckpointSpec(every=2, keep=5),
        "output": supervisor_process.location(f"file://{folder / 'out'}"),
    }
    setup = setup_of(folder, **{**defaults, **changes})
    (folder / "model").symlink_to(model)
    data = setup.run().data.model_copy(update={"validation_fraction": 0.2, "max_sequence_length": 96})
    config = setup.run().model.model_copy(update={"dtype": "float32"})
    return setup.with_changes(data=data, model=config)


def finished(setup: JobSetup, start: StartConfig | None = None) -> FinishedSupervisor:
    run = with_start(setup.run(), start) if start else setup.run()
    return supervisor_process.start(run, setup.folder, ranks=None).wait(180)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Outputs:
    root = tmp_path_factory.mktemp("start")
    first, whole, then = (job(root / name, models["llama"], name) for name in ("first", "whole", "then"))
    ranks = f"{sys.executable} {supervisor_process.ROOT}/tests/trainer/support/paced_rank.py"
    running = supervisor_process.start(first.run(), first.folder, ranks=ranks)
    supervisor_process.wait_until(lambda: (first.output / "checkpoints/step-4/manifest.json").exists(), 120)
    running.process.kill()
    running.process.wait()
    assert finished(whole).code == 0
    return Outputs(first.output, whole.output, then.output, finished(then, start_from(first.output, step=4)))


def test_a_continued_run_ends_with_the_same_bytes_as_an_undisturbed_one(outputs: Outputs) -> None:
    assert outputs.end.code == 0, outputs.end.output
    weights = "adapter_model.safetensors"
    assert (outputs.continued / weights).read_bytes() == (outputs.undisturbed / weights).read_bytes()
    configurations = [
        json.loads((f / "adapter_config.json").read_text()) | {"base_model_name_or_path": "each job's own link"}
        for f in (outputs.continued, outputs.undisturbed)
    ]
    assert configurations[0] == configurations[1]
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, lines) if line["type"] == "step"]
        for lines in (
            (f / "finetune/history.jsonl").read_text().splitlines() for f in (outputs.continued, outputs.undisturbed)
        )
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


def test_the_manifest_and_the_report_say_where_it_started(outputs: Outputs) -> None:
    manifest = Manifest.model_validate_json((outputs.continued / "finetune/manifest.json").read_bytes())
    (line,) = manifest.provenance["startedFrom"]
    assert line["uri"] == f"file://{outputs.stopped}/checkpoints/step-4"
    assert (line["job"], line["uid"], line["checkpointStep"], line["use"]) == (
        "ns/first", "uid-first", 4, "trainingState",
    )  # fmt: skip
    assert line["manifestDigest"].startswith("sha256:")
    assert "trainingState of ns/first after step 4" in (outputs.continued / "finetune/report.html").read_text()


def test_the_other_jobs_output_stays_as_it_was(outputs: Outputs) -> None:
    assert (outputs.stopped / "checkpoints/step-4/manifest.json").is_file()
    assert json.loads((outputs.stopped / "finetune/owner.json").read_text())["uid"] == "uid-first"


@pytest.mark.parametrize("source", ["checkpoint", "adapter"])
def test_a_second_stage_on_other_rows_starts_from_the_weights(
    source: str, outputs: Outputs, models: dict[str, Path], tmp_path: Path
) -> None:
    """With a learning rate of almost nothing, what it writes is what it started from."""
    recipe = {"max_steps": 1, "learning_rate": 1e-12, "warmup_ratio": 0.0, "seed": 7}
    second = job(tmp_path / "second", models["llama"], "second", rows=pairs(12, 5), training=recipe)
    folder = outputs.stopped if source == "checkpoint" else outputs.undisturbed
    ended = finished(second, start_from(folder, "weights", 4 if source == "checkpoint" else None))
    assert ended.code == 0, ended.output
    written = load_file(second.output / "adapter_model.safetensors")
    expected = (
        load_file(outputs.undisturbed / "adapter_model.safetensors")
        if source == "adapter"
        else {
            name.replace(".default.", "."): tensor
            for name, tensor in load_file(outputs.stopped / "checkpoints/step-4/weights.safetensors").items()
        }
    )
    assert written.keys() == expected.keys()
    assert all(float((written[name] - expected[name]).abs().max()) < 1e-9 for name in written)
    manifest = Manifest.model_validate_json((second.output / "finetune/manifest.json").read_bytes())
    assert [line["use"] for line in manifest.provenance["startedFrom"]] == ["weights"]


def download(run: RunConfig, target: Path) -> None:
    """Finds and downloads what a job starts from, as its pod does."""
    chosen = origin.find(run, supervisor_process.access(), None, lambda _: None)
    assert chosen is not None
    origin.fetch(chosen, target)


def spoil(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


# (what happens to the copy of the other job's output, the place and use, what the message says)
REFUSALS: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "a step that isn't there": (lambda out: None, {"step": 5}, "has no complete checkpoint after step 5; it has: "),
    "an altered file": (
        lambda out: spoil(out / "checkpoints/step-4/weights.safetensors"), {"step": 4},
        "is damaged: weights.safetensors has another sha256"),
    "an altered manifest": (
        lambda out: spoil(out / "checkpoints/step-4/manifest.json"), {"step": 4}, "no complete checkpoint after"),
    "nothing at all": (lambda out: out.rename(out.with_name("gone")), {}, "has no complete checkpoint"),
    "another rank": (lambda out: None, {"lora": LoraSpec(rank=8)}, "method.lora.rank was 4 there and is 8 here"),
    "fewer steps": (lambda out: None, {"training": {"max_steps": 4}, "step": 4}, "training.maxSteps is 4"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_does_not_fit_is_refused_before_training(
    change: Callable[[Path], object], options: dict[str, Any], message: str, outputs: Outputs, tmp_path: Path
) -> None:
    shutil.copytree(outputs.stopped, tmp_path / "other")
    change(tmp_path / "other")
    start = start_from(tmp_path / "other", step=options.pop("step", None))
    run = with_start(setup_of(tmp_path, **options).run(), start)
    run = run.model_copy(update={"data": JobSetup(tmp_path).run().data.model_copy(
        update={"validation_fraction": 0.2, "max_sequence_length": 96})})  # fmt: skip
    with pytest.raises(RunError, match="CheckpointInvalid") as error:
        download(run, tmp_path / "start")
    assert message in error.value.message
    assert error.value.message.startswith("model.checkpoint: ")


def test_the_adapter_of_a_finished_job_has_no_training_state(outputs: Outputs, tmp_path: Path) -> None:
    run = with_start(setup_of(tmp_path).run(), start_from(outputs.undisturbed))
    with pytest.raises(RunError, match="ns/whole has succeeded and left its result only"):
        origin.find(run, supervisor_process.access(), None, lambda _: None)
