"""The supervisor as a real process, with fake ranks, on local folders: a run that ends, one that is
already done, resumed or stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    return JobSetup(tmp_path).write_inputs()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_run_writes_the_result_its_history_and_a_manifest_that_covers_every_file(setup: JobSetup) -> None:
    ended = supervisor_process.supervise(setup.run(), setup.folder)
    assert ended.code == 0, ended.output
    assert files(setup.output) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "finetune/evaluation.json",
        "finetune/history.jsonl",
        "finetune/manifest.json",
        "finetune/report.html",
        "finetune/samples.jsonl",
    ]
    manifest = supervisor_process.manifest(setup.output)
    for file in manifest.files:
        assert hashlib.sha256((setup.output / file.path).read_bytes()).hexdigest() == file.sha256
    assert manifest.kind == "adapter"
    assert manifest.step == 4
    assert manifest.metrics["testLossBefore"] == 4.0
    assert manifest.metrics["testLossAfter"] == 1.5
    train = setup.train.read_bytes()
    assert manifest.provenance["data"]["train"]["digest"] == f"sha256:{hashlib.sha256(train).hexdigest()}"
    assert manifest.provenance["model"]["digest"].startswith("sha256:")
    assert "torch" in manifest.provenance["versions"]
    last = ended.last
    assert last.outcome == "succeeded"
    assert last.artifact is not None
    data = (setup.output / "finetune" / "manifest.json").read_bytes()
    assert last.artifact.manifest_digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert last.evaluation is not None
    assert (last.evaluation.eval_loss, last.evaluation.train_loss) == (0.9, 0.75)
    (score,) = last.evaluation.scores
    assert (score.name, score.base, score.tuned, score.low, score.high) == ("rougeL", 0.1, 0.3, 0.1235, 0.25)
    assert last.evaluation.scored_rows == 1
    page = (setup.output / "finetune" / "report.html").read_text()
    assert "ROUGE-L" in page
    assert set(manifest.provenance["cost"]["phases"]) <= {"starting", "fetching", "checking", "loading", "training"}
    assert last.model is not None
    assert last.model.trainable_parameters == 10


def test_the_ranks_output_is_relayed_with_their_number_and_the_supervisors_own_lines_are_json(setup: JobSetup) -> None:
    ended = supervisor_process.supervise(setup.run(), setup.folder)
    lines = ended.output.splitlines()
    assert "[rank 0] rank 0 of 2 is here" in lines
    assert "[rank 1] rank 1 of 2 is here" in lines
    own = [json.loads(line) for line in lines if not line.startswith("[rank ")]
    assert any(line["message"] == "ranks started" for line in own)


def test_a_finished_destination_is_success_without_training(setup: JobSetup) -> None:
    first = supervisor_process.supervise(setup.run(), setup.folder)
    again = supervisor_process.supervise(setup.run(attempt=2), setup.folder, ranks="/bin/false")
    assert again.code == 0, again.output
    assert again.last.artifact == first.last.artifact
    assert again.last.evaluation == first.last.evaluation


def test_another_jobs_result_is_refused_before_anything_is_trained(setup: JobSetup) -> None:
    supervisor_process.supervise(setup.run(), setup.folder)
    ended = supervisor_process.supervise(setup.run(uid="uid-2"), setup.folder, ranks="/bin/false")
    assert (ended.code, ended.last.reason) == (67, "OutputOccupied")
    assert "ns/job" in ended.last.message
    assert "choose another output.uri" in ended.last.message


def test_a_stop_saves_a_checkpoint_and_the_next_attempt_resumes_from_it(setup: JobSetup) -> None:
    hold = {"hold": str(setup.folder / "go"), "hold_at": 3, "steps": 6}
    running = supervisor_process.start(setup.run(), setup.folder, behavior=hold)
    supervisor_process.wait_until(lambda: '"step":3' in (setup.folder / "scratch/events/rank-0.jsonl").read_text()
                if (setup.folder / "scratch/events/rank-0.jsonl").exists() else False)  # fmt: skip
    running.terminate()
    stopped = running.wait()
    assert stopped.code == 143, stopped.output
    assert stopped.last.outcome == "preempted"
    assert stopped.last.checkpoint is not None
    step = stopped.last.checkpoint.step
    assert step == 4
    assert stopped.last.checkpoint.uri.endswith("/checkpoints/step-4")

    (setup.folder / "go").touch()
    ended = supervisor_process.supervise(setup.run(attempt=2), setup.folder, behavior=hold)
    assert ended.code == 0, ended.output
    history = [json.loads(line) for line in (setup.output / "finetune/history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if line["type"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert supervisor_process.manifest(setup.output).metrics["testLossBefore"] == 4.0
    assert supervisor_process.manifest(setup.output).metrics["tokens"] == 600
    assert not (setup.output / "checkpoints").exists()


def test_a_stop_before_the_first_step_ends_immediately(setup: JobSetup) -> None:
    running = supervisor_process.start(setup.run(), setup.folder, behavior={"loading": 60})
    events = setup.folder / "scratch/events/rank-0.jsonl"
    supervisor_process.wait_until(lambda: events.exists() and events.read_text())
    running.terminate()
    ended = running.wait(timeout=10)
    assert (ended.code, ended.last.outcome, ended.last.checkpoint) == (143, "preempted", None)


def test_a_second_signal_ends_without_waiting_for_a_checkpoint(setup: JobSetup) -> None:
    behavior = {"at_step": 3, "then": "hang", "checkpoint_every": 2}
    running = supervisor_process.start(setup.run(), setup.folder, behavior=behavior)
    supervisor_process.wait_until(lambda: (setup.output / "checkpoints/step-2/manifest.json").exists())
    running.terminate()
    with pytest.raises(Exception, match="timed out"):
        running.process.wait(1.0)
    running.terminate()
    ended = running.wait(timeout=10)
    assert ended.code == 143
    assert ended.last.checkpoint is not None
    assert ended.last.checkpoint.step == 2


def test_old_checkpoints_are_pruned_while_training_and_all_are_deleted_at_the_end(setup: JobSetup) -> None:
    behavior = {"steps": 8, "checkpoint_every": 1, "hold": str(setup.folder / "go"), "hold_at": 7, "seconds": 0.2}
    running = supervisor_process.start(setup.run(), setup.folder, behavior=behavior)
    supervisor_process.wait_until(lambda: (setup.output / "checkpoints/step-7/manifest.json").exists())
    supervisor_process.wait_until(lambda: len(list((setup.output / "checkpoints").iterdir())) == 2)
    (setup.folder / "go").touch()
    assert running.wait().code == 0
    assert not (setup.output / "checkpoints").exists()


def test_a_node_that_does_not_lead_writes_nothing_and_succeeds(setup: JobSetup) -> None:
    run = setup.with_changes(world=setup.run().world.model_copy(update={"nodes": 2})).run()
    ended = supervisor_process.supervise(run, setup.folder, node=1)
    assert ended.code == 0, ended.output
    assert "[rank 3] rank 3 of 4 is here" in ended.output
    assert not setup.output.exists()


def test_the_supervisor_never_imports_torch(setup: JobSetup) -> None:
    import subprocess
    import sys

    code = (
        "import sys, finetune_trainer.supervisor.supervisor, finetune_trainer.supervisor.preflight;"
        "import finetune_trainer.storage.huggingface, "
        "finetune_trainer.storage.bucket, finetune_trainer.__main__; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'kubernetes') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": f"{supervisor_process.ROOT / 'trainer_image'}:{supervisor_process.ROOT / 'operator'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"
