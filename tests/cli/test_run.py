"""`finetune run` as a person uses it: the real trainer on a tiny model, stopped by Ctrl-C and
resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testkit.tiny_models import tiny_llama

JOB = """
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata: {name: tiny}
spec:
  model: {uri: s3://models/tiny}
  dataset:
    uri: s3://data/train.jsonl
    validation: {fraction: 0.2}
    test: {uri: s3://data/test.jsonl}
    maxSequenceLength: 64
  method: {type: lora, lora: {rank: 4, alpha: 8}}
  training: {maxSteps: 400, globalBatchSize: 4, learningRate: 1.0e-2}
  checkpoint: {every: 50}
  evaluation: {samples: 1, maxNewTokens: 4}
  output: {uri: s3://outputs/tiny}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("run")
    tiny_llama(where / "model")
    rows = [{"prompt": f"Define the noun: {i}.", "completion": f" Number {i}."} for i in range(30)]
    (where / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (where / "job.yaml").write_text(JOB)
    return where


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    places = ["--model", "model", "--dataset", "train.jsonl", "--test", "test.jsonl", "--processes", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_cli.main", "run", "job.yaml", *places, "--scratch", "scratch", *more],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if not key.startswith("AWS_")},
    )


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_resumes_to_a_result(folder: Path) -> None:
    first = start(folder)
    deadline = time.monotonic() + 400
    while not list((folder / "tiny-output").glob("checkpoints/step-*/manifest.json")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=200)
    assert first.returncode == 143, output
    assert "saving a checkpoint; press Ctrl-C again to stop immediately" in output
    assert "Run the same command again to resume." in output

    second = start(folder, "-v")
    output, _ = second.communicate(timeout=600)
    assert second.returncode == 0, output
    assert "resuming from a checkpoint" in output
    assert "adapter_model.safetensors" in output
    assert "test loss" in output
    assert "PeftModel.from_pretrained" in output
    assert "perplexity " in output
    assert (folder / "tiny-output/finetune/report.html").is_file()
    assert "tokens/s" in output
    history = (folder / "tiny-output/finetune/history.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in history if json.loads(line)["type"] == "step"]
    assert steps == list(range(1, 401))
    assert not (folder / "tiny-output/checkpoints").exists()

    third = start(folder)
    output, _ = third.communicate(timeout=60)
    assert third.returncode == 0, output
    assert "test loss" in output


def test_what_the_trainer_refuses_is_shown_with_a_hint_and_its_exit_code(folder: Path) -> None:
    ended = start(folder, "--dataset", "nowhere.jsonl", "--output", "other")
    output, _ = ended.communicate(timeout=60)
    assert ended.returncode == 65, output
    assert "DatasetNotFound: " in output
    assert "nowhere.jsonl" in output
    assert "hint: Check whether the dataset exists" in output


def test_a_wrong_option_is_refused_before_anything_runs(folder: Path) -> None:
    ended = start(folder, "--processes", "100")
    output, _ = ended.communicate(timeout=30)
    assert ended.returncode == 2
    assert "training.globalBatchSize is 4" in output
