"""What the supervisor's tests share: a job's inputs on disk, its RunConfig, and a real supervisor
process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.messages import result
from finetune_api.messages.manifest import Manifest
from finetune_api.messages.run import (
    DataConfig,
    JobRef,
    Location,
    ModelConfig,
    ProgressConfig,
    RunConfig,
    S3Config,
    WorldConfig,
)
from finetune_api.resource import CheckpointSpec, LoraSpec, TrainingSpec
from finetune_trainer.storage.schemes import Access

ROOT = Path(__file__).parents[3]
STARTED: list[subprocess.Popen[str]] = []  # conftest.py kills them after each test
FAKE_RANK_COMMAND = f"{sys.executable} {Path(__file__).with_name('fake_rank.py')}"
ROWS = "".join(json.dumps({"prompt": f"question {i}", "completion": f" answer {i}"}) + "\n" for i in range(8))


def small_model(folder: Path) -> Path:
    """Writes a folder that looks like a model. No test loads its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    return folder


def location(uri: str, credentials: Path | None = None, revision: str | None = None) -> Location:
    return Location(uri=uri, display=uri, credentials=str(credentials) if credentials else None, revision=revision)


def access() -> Access:
    """Opens storages as a pod without an environment does."""
    return Access(S3Config(), {})


def secret(folder: Path, values: dict[str, str]) -> Path:
    """Writes a mounted Secret, which has one file for each key."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in values.items():
        (folder / key).write_text(value)
    return folder


@dataclass(frozen=True)
class JobSetup:
    """The inputs of one job on this machine. `changes` are fields of its RunConfig."""

    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def write_inputs(self) -> JobSetup:
        small_model(self.model)
        self.train.write_text(ROWS)
        return self

    def with_changes(self, **changes: Any) -> JobSetup:
        """Returns a copy whose RunConfig has these fields."""
        return JobSetup(self.folder, {**self.changes, **changes})

    def run(self, attempt: int = 1, uid: str = "uid-1", scratch: str = "scratch") -> RunConfig:
        defaults: dict[str, Any] = {
            "job": JobRef(namespace="ns", name="job", uid=uid, attempt=attempt),
            "model": ModelConfig(location=location(f"file://{self.model}")),
            "data": DataConfig(train=location(f"file://{self.train}")),
            "method": "lora",
            "lora": LoraSpec(),
            "training": TrainingSpec(max_steps=4, global_batch_size=2),
            "world": WorldConfig(processes_per_node=2),
            "checkpoint": CheckpointSpec(keep=2),
            "output": location(f"file://{self.output}"),
            "scratch": str(self.folder / scratch),
            "metrics_port": 0,
            "grace_seconds": 30,
            "s3": S3Config(),
        }
        return RunConfig(**{**defaults, **self.changes})


@dataclass
class RunningSupervisor:
    """A running supervisor process. `folder` holds its run.json and termination log."""

    process: subprocess.Popen[str]
    folder: Path

    def wait(self, timeout: float = 60) -> FinishedSupervisor:
        """Returns the exit code, the Result in the termination log, and the output. Raises
        subprocess.TimeoutExpired after `timeout` seconds."""
        output, _ = self.process.communicate(timeout=timeout)
        termination_log = self.folder / "termination"
        return FinishedSupervisor(
            self.process.returncode,
            result.decode(termination_log.read_text() if termination_log.exists() else ""),
            output,
        )

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@dataclass(frozen=True)
class FinishedSupervisor:
    """The exit code, Result and output of a supervisor that has ended."""

    code: int
    result: result.Result | None
    output: str

    @property
    def last(self) -> result.Result:
        """The Result in the termination log. Asserts that it was written."""
        assert self.result is not None, self.output
        return self.result


def start(
    run: RunConfig,
    folder: Path,
    *,
    command: str = "supervise",
    node: int = 0,
    behavior: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    ranks: str | None = FAKE_RANK_COMMAND,
) -> RunningSupervisor:
    """Starts `python -m finetune_trainer` as in a pod, with `fake_rank` instead of real ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "termination").unlink(missing_ok=True)
    (folder / "run.json").write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "HF_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer", command, *(["--rank-command", ranks] if ranks else [])],
        env={
            **inherited,
            "PYTHONPATH": f"{ROOT / 'trainer_image'}:{ROOT / 'operator'}",
            "FINETUNE_RUN_CONFIG": str(folder / "run.json"),
            "FINETUNE_TERMINATION_LOG": str(folder / "termination"),
            "FINETUNE_STAND_IN": json.dumps(behavior or {}),
            "JOB_COMPLETION_INDEX": str(node),
            **(environment or {}),
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    STARTED.append(process)
    return RunningSupervisor(process, folder)


def supervise(run: RunConfig, folder: Path, **options: Any) -> FinishedSupervisor:
    """Starts a supervisor with the options of `start` and waits for its end."""
    return start(run, folder, **options).wait()


def wait_until(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Waits until a condition is true. Asserts that this happens within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.02)


def manifest(output: Path) -> Manifest:
    return Manifest.model_validate_json((output / "finetune" / "manifest.json").read_bytes())


def progress_config(url: str, token: Path, interval: float = 0.1) -> ProgressConfig:
    return ProgressConfig(url=url, token_path=str(token), interval_seconds=interval)
