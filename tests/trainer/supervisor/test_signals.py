"""Requests to stop at awkward moments: while fetching, while uploading, and on one node of two."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_api.messages.run import DataConfig, ModelConfig, S3Config, WorldConfig
from finetune_api.resource import CheckpointSpec, LoraSpec, TrainingSpec
from finetune_trainer.errors import RunError
from finetune_trainer.model_folder import Capacity
from finetune_trainer.paths import Paths
from finetune_trainer.storage.schemes import Access
from finetune_trainer.supervisor import download
from finetune_trainer.supervisor.inspection import checks
from testkit.tiny_models import tiny_llama
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    return JobSetup(tmp_path).write_inputs()


def test_a_stop_while_a_store_does_not_answer_ends_immediately(setup: JobSetup) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        run = setup.with_changes(
            output=supervisor_process.location(
                "s3://outputs/v1", supervisor_process.secret(setup.folder / "keys", keys)
            ),
            s3=S3Config(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", allow_http=True),
        ).run()
        running = supervisor_process.start(run, setup.folder)
        silent.settimeout(20)
        connection, _ = silent.accept()
        began = time.monotonic()
        running.terminate()
        ended = running.wait(timeout=10)
        connection.close()
    assert (ended.code, ended.last.outcome) == (143, "preempted")
    assert time.monotonic() - began < 5


def test_a_preflight_ends_immediately(setup: JobSetup) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        run = setup.with_changes(
            output=supervisor_process.location(
                "s3://outputs/v1", supervisor_process.secret(setup.folder / "keys", keys)
            ),
            s3=S3Config(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", allow_http=True),
        ).run()
        running = supervisor_process.start(run, setup.folder, command="preflight")
        silent.settimeout(20)
        silent.accept()
        running.terminate()
        assert running.process.wait(timeout=10) == 143


def test_a_preflight_that_is_stopped_gives_the_output_back(setup: JobSetup) -> None:
    """Otherwise a job that is deleted while it is checked keeps its output from all others."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        keys = supervisor_process.secret(
            setup.folder / "keys", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        )
        place = supervisor_process.location("s3://models/base", keys)
        run = setup.with_changes(
            model=ModelConfig(location=place),
            s3=S3Config(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", allow_http=True),
        ).run()
        running = supervisor_process.start(run, setup.folder, command="preflight")
        silent.settimeout(20)
        silent.accept()
        assert (setup.output / "finetune/owner.json").is_file()
        running.terminate()
        assert running.process.wait(timeout=10) == 143
    assert not (setup.output / "finetune/owner.json").exists()


def test_preflight_counts_rows_and_tokens_and_leaves_no_weights_behind(setup: JobSetup) -> None:
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    data = DataConfig(train=supervisor_process.location(f"file://{setup.train}"), max_sequence_length=64)
    ended = supervisor_process.supervise(setup.with_changes(data=data).run(), setup.folder, command="preflight")
    assert ended.code == 0, ended.output
    assert ended.last.message.startswith("train: 8 rows, ")
    assert "tokens of which" in ended.last.message
    assert not (setup.folder / "scratch" / "model").exists()
    assert [path.name for path in setup.output.rglob("*") if path.is_file()] == ["owner.json"]


def test_preflight_never_imports_torch(setup: JobSetup) -> None:
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    data = DataConfig(train=supervisor_process.location(f"file://{setup.train}"), max_sequence_length=64)
    config = setup.folder / "run.json"
    config.write_text(setup.with_changes(data=data).run().model_dump_json(by_alias=True, exclude_none=True))
    code = "import sys; from finetune_trainer.__main__ import main; print(main(['preflight']), 'torch' in sys.modules)"
    environment = {
        "PYTHONPATH": f"{supervisor_process.ROOT / 'trainer_image'}:{supervisor_process.ROOT / 'operator'}",
        "FINETUNE_RUN_CONFIG": str(config),
        "FINETUNE_TERMINATION_LOG": str(setup.folder / "termination"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def _check_tokens(setup: JobSetup) -> str:
    """What preflight counts once the model was built: 512 positions, and an embedding for each
    token."""
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    run = setup.run()
    paths = Paths(Path(run.scratch))
    paths.scratch.mkdir()
    paths.model.symlink_to(setup.model)
    download.data(run, paths, Access(run.s3, {}), lambda _: None)
    return checks.check_tokens(run, paths, Capacity(300, None, 512), checks.Progress(lambda _: None))[0]


def test_preflight_refuses_rows_longer_than_the_model_has_positions(setup: JobSetup) -> None:
    setup.train.write_text(json.dumps({"prompt": "Count: ", "completion": "one two three " * 2000}) + "\n")
    with pytest.raises(RunError, match=r"dataset\.uri has a row of 2048 tokens") as refused:
        _check_tokens(setup)
    assert refused.value.reason == "InvalidConfig"


def test_preflight_accepts_short_rows_under_a_long_limit(setup: JobSetup) -> None:
    assert _check_tokens(setup).startswith("train: 8 rows, ")


def test_preflight_refuses_rows_that_leave_nothing_to_train_on(setup: JobSetup) -> None:
    data = DataConfig(train=supervisor_process.location(f"file://{setup.train}"), max_sequence_length=8)
    with pytest.raises(RunError, match="maxSequenceLength") as refused:
        _check_tokens(setup.with_changes(data=data))
    assert refused.value.reason == "DatasetInvalid"


def test_preflight_refuses_rows_that_dont_fit_the_objective(setup: JobSetup) -> None:
    training = TrainingSpec(objective="dpo", max_steps=4, global_batch_size=2)
    with pytest.raises(RunError, match="objective dpo needs rows with prompt, chosen and rejected") as refused:
        _check_tokens(setup.with_changes(training=training))
    assert refused.value.reason == "DatasetInvalid"


def test_preflight_ends_with_the_reason_for_a_model_that_cant_be_trained(setup: JobSetup) -> None:
    """Nothing but the header of the weights is read."""
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    run = setup.with_changes(lora=LoraSpec(target_modules=("qkv_proj",))).run()
    ended = supervisor_process.supervise(run, setup.folder, command="preflight")
    assert (ended.code, ended.last.reason) == (64, "InvalidConfig")
    assert "the model has no linear layer called qkv_proj; it has down_proj" in ended.last.message
    assert "Traceback" not in ended.output


def test_two_nodes_stop_together_when_one_is_terminated_and_resume_together(setup: JobSetup) -> None:
    """With real ranks: they agree to stop, on whichever node the flag is set, and each node uploads
    its own shards."""
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    rows = [{"prompt": f"Define the noun: {i}.", "completion": f" Number {i}."} for i in range(20)]
    setup.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = setup.with_changes(
        data=DataConfig(train=supervisor_process.location(f"file://{setup.train}"), max_sequence_length=64),
        world=WorldConfig(nodes=2, processes_per_node=1, strategy="fsdp", master_port=port),
        training=TrainingSpec(max_steps=3000, global_batch_size=2),
        checkpoint=CheckpointSpec(every=100000, shards="always"),
    )

    def start(attempt: int) -> tuple[supervisor_process.RunningSupervisor, supervisor_process.RunningSupervisor]:
        runs = [shared.run(attempt=attempt, scratch=f"scratch-{node}") for node in (0, 1)]
        first, second = (
            supervisor_process.start(run, setup.folder / f"node-{node}", node=node, ranks=None)
            for node, run in enumerate(runs)
        )
        return first, second

    leader, other = start(attempt=1)
    events = setup.folder / "scratch-0/events/rank-0.jsonl"
    supervisor_process.wait_until(lambda: events.exists() and '"step":5,' in events.read_text(), timeout=90)
    other.terminate()
    ended_other, ended_leader = other.wait(), leader.wait()
    assert ended_other.code == 143, ended_other.output
    assert ended_leader.code == 143, ended_leader.output
    assert ended_leader.last.checkpoint is not None

    step = ended_leader.last.checkpoint.step
    folder = setup.output / "checkpoints" / f"step-{step}"
    shards = {f"{kind}-{rank}.safetensors" for kind in ("weights", "optimizer") for rank in (0, 1)}
    assert shards <= {path.name for path in folder.iterdir()}
    leader, other = start(attempt=2)
    supervisor_process.wait_until(lambda: events.exists() and f'"step":{step + 1},' in events.read_text(), timeout=90)
    leader.terminate()
    assert leader.wait().code == 143
    assert other.wait().code == 0  # its ranks agreed to stop; this pod got no signal
