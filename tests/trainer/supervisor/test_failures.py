"""Failures within one pod, with a real supervisor and real signals: inputs, ranks, memory and
stalls."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages.run import DataConfig, ModelConfig
from trainer.support import supervisor_process
from trainer.support.supervisor_process import FinishedSupervisor, JobSetup


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    return JobSetup(tmp_path).write_inputs()


def ending(setup: JobSetup, behavior: dict[str, Any] | None = None, **how: Any) -> FinishedSupervisor:
    ended = supervisor_process.supervise(setup.run(), setup.folder, behavior=behavior, **how)
    assert ended.last.outcome == "failed", ended.output
    return ended


INPUTS = {
    "an empty file": ("", 65, "DatasetInvalid", "is empty"),
    "a broken line": (supervisor_process.ROWS + '{"prompt": "a", "comple\n', 65, "DatasetInvalid", "row 9: isn't JSON"),
    "a row without completion": (
        supervisor_process.ROWS + '{"prompt": "a"}\n',
        65,
        "DatasetInvalid",
        "row 9: completion is missing",
    ),
    "blank lines only": ("\n\n\n", 65, "DatasetInvalid", "it is empty"),
}


@pytest.mark.parametrize(("text", "code", "reason", "text_in_message"), INPUTS.values(), ids=INPUTS)
def test_rows_that_cannot_be_used_are_named_before_a_rank_starts(
    setup: JobSetup, text: str, code: int, reason: str, text_in_message: str
) -> None:
    setup.train.write_text(text)
    ended = ending(setup, ranks="/bin/false")
    assert (ended.code, ended.last.reason) == (code, reason)
    assert text_in_message in ended.last.message
    assert "dataset" in ended.last.message


def test_invalid_rows_are_left_to_the_ranks_if_they_may_be_dropped(setup: JobSetup) -> None:
    setup.train.write_text(supervisor_process.ROWS + "{broken\n")
    data = DataConfig(train=supervisor_process.location(f"file://{setup.train}"), on_invalid="drop")
    assert supervisor_process.supervise(setup.with_changes(data=data).run(), setup.folder).code == 0


def test_a_data_file_that_is_not_there_is_named(setup: JobSetup) -> None:
    setup.train.unlink()
    ended = ending(setup)
    assert (ended.code, ended.last.reason) == (65, "DatasetNotFound")
    assert str(setup.train) in ended.last.message


def test_a_model_that_is_not_there_is_named(setup: JobSetup) -> None:
    place = ModelConfig(location=supervisor_process.location("file:///nowhere/at/all"))
    ended = ending(setup.with_changes(model=place))
    assert (ended.code, ended.last.reason) == (66, "ModelNotFound")
    assert "/nowhere/at/all" in ended.last.message


def test_a_folder_that_is_not_a_model_is_refused(setup: JobSetup) -> None:
    (setup.model / "config.json").unlink()
    ended = ending(setup)
    assert (ended.code, ended.last.reason) == (66, "ModelInvalid")
    assert "config.json" in ended.last.message


def test_a_model_of_pickles_only_is_refused_and_nothing_is_unpickled(setup: JobSetup) -> None:
    (setup.model / "model.safetensors").rename(setup.model / "pytorch_model.bin")
    ended = ending(setup)
    assert (ended.code, ended.last.reason) == (66, "ModelInvalid")
    assert "pytorch_model.bin" in ended.last.message
    assert "safetensors" in ended.last.message


def test_pickles_next_to_safetensors_are_never_downloaded_to_the_node(setup: JobSetup) -> None:
    (setup.model / "pytorch_model.bin").write_bytes(b"evil")
    (setup.model / "modeling_evil.py").write_text("raise SystemExit")
    assert supervisor_process.supervise(setup.run(), setup.folder).code == 0
    fetched = {path.name for path in (setup.folder / "scratch" / "model").iterdir()}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}


def test_a_destination_that_cannot_be_written_is_refused_before_training(setup: JobSetup) -> None:
    (setup.folder / "file").write_text("not a folder")
    ended = ending(setup.with_changes(output=supervisor_process.location(f"file://{setup.folder}/file/below")))
    assert ended.code == 67
    assert ended.last.reason == "OutputNotFound"


def test_a_killed_rank_is_rank_killed_and_the_others_are_ended(setup: JobSetup) -> None:
    behavior = {"steps": 100, "seconds": 0.1, "at_step": 3, "on_rank": 1, "then": "kill"}
    ended = ending(setup, behavior)
    assert (ended.code, ended.last.reason, ended.last.rank, ended.last.exit_code) == (72, "RankKilled", 1, 137)
    assert "rank 1" in ended.last.message
    assert "rank 1 of 2 is here" in ended.last.log_tail
    assert ended.last.checkpoint is not None


def test_a_run_that_fails_writes_a_report_that_explains_why(setup: JobSetup) -> None:
    ended = ending(setup, behavior={"steps": 9, "seconds": 0.01, "at_step": 3, "on_rank": 0, "then": "error"})
    page = (setup.output / "finetune" / "report.html").read_text()
    assert ended.last.reason == "NonFiniteLoss"
    for text in ("Failed", "loss became NaN at step 3", "training.learningRate"):
        assert text in page
    assert not (setup.output / "finetune" / "manifest.json").exists()


def test_a_rank_killed_from_outside_is_noticed(setup: JobSetup) -> None:
    running = supervisor_process.start(setup.run(), setup.folder, behavior={"steps": 1000, "seconds": 0.1})
    events = setup.folder / "scratch/events/rank-0.jsonl"
    supervisor_process.wait_until(lambda: events.exists() and '"step":2' in events.read_text())
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    ended = running.wait()
    assert (ended.code, ended.last.reason, ended.last.rank) == (72, "RankKilled", 0)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_the_reason_that_a_rank_itself_reports_is_used(setup: JobSetup) -> None:
    ended = ending(setup, {"at_step": 3, "then": "error"})
    assert (ended.code, ended.last.reason, ended.last.rank) == (71, "NonFiniteLoss", 0)
    assert ended.last.message == "rank 0: loss became NaN at step 3"


def test_a_broken_connection_without_a_local_cause_is_peer_lost(setup: JobSetup) -> None:
    ended = ending(setup, {"at_step": 3, "then": "exit"})
    assert (ended.code, ended.last.reason) == (75, "PeerLost")


def test_a_crash_is_the_programs_own_failure(setup: JobSetup) -> None:
    ended = ending(setup, {"at_step": 3, "on_rank": 1, "then": "abort"})
    assert (ended.code, ended.last.reason, ended.last.exit_code) == (1, "TrainingError", 134)


def test_a_hanging_rank_is_a_stall(setup: JobSetup) -> None:
    ended = ending(setup.with_changes(stall_seconds=4), {"at_step": 3, "then": "hang"})
    assert (ended.code, ended.last.reason) == (73, "Stalled")
    assert "runPolicy.stallSeconds=4 in phase training" in ended.last.message
    assert ended.last.checkpoint is not None
    assert ended.last.checkpoint.step == 2


def test_ranks_without_memory_leave_a_record_for_the_next_attempt_until_the_job_is_done(setup: JobSetup) -> None:
    record, halvings = setup.output / "checkpoints" / "memory.json", setup.folder / "scratch" / "halvings"
    record.parent.mkdir(parents=True)
    record.write_text('{"uid": "another job", "halvings": 7}')
    behavior = {"at_step": 3, "on_rank": 1, "then": "memory", "checkpoint_every": 1000}
    for attempt in (1, 2):
        ended = supervisor_process.supervise(setup.run(attempt=attempt), setup.folder, behavior=behavior)
        assert ended.last.reason == "OutOfMemory", ended.output
        assert halvings.read_text() == str(attempt - 1)
    assert supervisor_process.supervise(setup.run(attempt=3), setup.folder).code == 0
    assert halvings.read_text() == "2"
    assert not record.exists()


def test_a_lack_of_memory_is_final_if_micro_batches_cannot_get_smaller(setup: JobSetup) -> None:
    ended = ending(setup, {"at_step": 3, "on_rank": 1, "then": "memory", "smallest": True})
    assert (ended.code, ended.last.reason, ended.last.rank) == (81, "InsufficientMemory", 1)
    for part in ("CUDA out of memory", "dataset.maxSequenceLength", "resources.memory"):
        assert part in ended.last.message


def test_slow_loading_is_not_a_stall_while_the_limit_is_off(setup: JobSetup) -> None:
    ended = supervisor_process.supervise(
        setup.with_changes(stall_seconds=0).run(), setup.folder, behavior={"loading": 1.5}
    )
    assert ended.code == 0, ended.output


def test_orphans_of_a_rank_are_reaped(setup: JobSetup) -> None:
    behavior = {"at_step": 2, "then": "orphan", "steps": 200, "seconds": 0.05}
    running = supervisor_process.start(setup.run(), setup.folder, behavior=behavior)
    events = setup.folder / "scratch/events/rank-0.jsonl"
    supervisor_process.wait_until(lambda: events.exists() and '"step":15' in events.read_text())
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children]
    assert len(children) == 2
    assert "Z" not in states
    running.terminate()
    assert running.wait().code == 143


def test_ranks_die_with_their_supervisor(setup: JobSetup) -> None:
    running = supervisor_process.start(setup.run(), setup.folder, behavior={"steps": 1000, "seconds": 0.1})
    events = setup.folder / "scratch/events/rank-0.jsonl"
    supervisor_process.wait_until(lambda: events.exists() and '"step":2' in events.read_text())
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    running.process.kill()
    running.process.wait()
    supervisor_process.wait_until(lambda: not any(alive(pid) for pid in children))


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ranks_see_no_credentials(setup: JobSetup) -> None:
    dump = setup.folder / "env.sh"
    dump.write_text("#!/bin/sh\nenv\nexit 3\n")
    dump.chmod(0o755)
    secrets = {"AWS_SECRET_ACCESS_KEY": "s3cret", "HF_TOKEN": "hf_s3cret", "NCCL_DEBUG": "INFO"}
    ended = ending(setup, ranks=str(dump), environment=secrets)
    assert "s3cret" not in ended.output
    assert "NCCL_DEBUG=INFO" in ended.output
    assert "WORLD_SIZE=2" in ended.output


def test_a_run_configuration_that_is_wrong_names_the_field(setup: JobSetup, tmp_path: Path) -> None:
    running = supervisor_process.start(setup.run(), tmp_path, environment={"FINETUNE_RUN_CONFIG": "/nowhere"})
    ended = running.wait()
    assert (ended.code, ended.last.reason) == (64, "InvalidConfig")
    assert "/nowhere" in ended.last.message


def test_a_failure_of_the_supervisor_itself_is_reported_with_its_traceback(setup: JobSetup) -> None:
    ended = ending(setup.with_changes(scratch="/proc/nowhere"))
    assert ended.code == 1
    assert "supervisor.py" in ended.last.log_tail  # how many frames fit depends on the length of the paths
    assert "FileNotFoundError" in ended.last.log_tail.splitlines()[-1]
