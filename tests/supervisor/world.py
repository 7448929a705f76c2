"""What the supervisor's tests share: a job's inputs on disk, its RunConfig, and a real supervisor process."""

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

from finetune_api import result
from finetune_api.manifest import Manifest
from finetune_api.resource import CheckpointSpec, LoraSpec, TrainingSpec
from finetune_api.run import (
    DataConfig,
    JobRef,
    Location,
    ModelConfig,
    ProgressConfig,
    RunConfig,
    S3Config,
    WorldConfig,
)

ROOT = Path(__file__).parents[2]
STARTED: list[subprocess.Popen[str]] = []  # ended by conftest after each test
STAND_IN = f"{sys.executable} {Path(__file__).with_name('stand_in.py')}"
ROWS = "".join(json.dumps({"prompt": f"question {i}", "completion": f" answer {i}"}) + "\n" for i in range(8))


def small_model(folder: Path) -> Path:
    """A folder that looks like a model; nobody loads its weights here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    return folder


def place(uri: str, credentials: Path | None = None, revision: str | None = None) -> Location:
    return Location(uri=uri, display=uri, credentials=str(credentials) if credentials else None, revision=revision)


def secret(folder: Path, values: dict[str, str]) -> Path:
    """A mounted Secret: one file a key."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in values.items():
        (folder / key).write_text(value)
    return folder


@dataclass(frozen=True)
class Setup:
    """One job on this machine. `at` returns a changed copy of the RunConfig's fields."""

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

    def write_inputs(self) -> Setup:
        small_model(self.model)
        self.train.write_text(ROWS)
        return self

    def but(self, **changes: Any) -> Setup:
        return Setup(self.folder, {**self.changes, **changes})

    def run(self, attempt: int = 1, uid: str = "uid-1", scratch: str = "scratch") -> RunConfig:
        plain: dict[str, Any] = {
            "job": JobRef(namespace="ns", name="job", uid=uid, attempt=attempt),
            "model": ModelConfig(location=place(f"file://{self.model}")),
            "data": DataConfig(train=place(f"file://{self.train}")),
            "method": "lora",
            "lora": LoraSpec(),
            "training": TrainingSpec(max_steps=4, global_batch_size=2),
            "world": WorldConfig(processes_per_node=2),
            "checkpoint": CheckpointSpec(keep=2),
            "output": place(f"file://{self.output}"),
            "scratch": str(self.folder / scratch),
            "metrics_port": 0,
            "grace_seconds": 30,
            "s3": S3Config(),
        }
        return RunConfig(**{**plain, **self.changes})


@dataclass
class Running:
    """A supervisor process. `wait` gives its exit code and its last word."""

    process: subprocess.Popen[str]
    folder: Path

    def wait(self, timeout: float = 60) -> Ended:
        output, _ = self.process.communicate(timeout=timeout)
        last = self.folder / "termination"
        return Ended(self.process.returncode, result.decode(last.read_text() if last.exists() else ""), output)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@dataclass(frozen=True)
class Ended:
    code: int
    result: result.Result | None
    output: str

    @property
    def last(self) -> result.Result:
        assert self.result is not None, self.output
        return self.result


def start(
    run: RunConfig,
    folder: Path,
    *,
    command: str = "supervise",
    node: int = 0,
    behaviour: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    ranks: str | None = STAND_IN,
) -> Running:
    """`python -m finetune_trainer` as in a pod, with the stand-in for ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "termination").unlink(missing_ok=True)
    (folder / "run.json").write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    own = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "HF_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer", command, *(["--rank-command", ranks] if ranks else [])],
        env={
            **own,
            "PYTHONPATH": f"{ROOT / 'trainer_image'}:{ROOT / 'operator'}",
            "FINETUNE_RUN_CONFIG": str(folder / "run.json"),
            "FINETUNE_TERMINATION_LOG": str(folder / "termination"),
            "FINETUNE_STAND_IN": json.dumps(behaviour or {}),
            "JOB_COMPLETION_INDEX": str(node),
            **(environment or {}),
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    STARTED.append(process)
    return Running(process, folder)


def supervise(run: RunConfig, folder: Path, **how: Any) -> Ended:
    return start(run, folder, **how).wait()


def until(what: Callable[[], object], timeout: float = 20.0) -> None:
    """Waits for something to become true."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.02)


def manifest(output: Path) -> Manifest:
    return Manifest.model_validate_json((output / "finetune" / "manifest.json").read_bytes())


def progress_config(url: str, token: Path, interval: float = 0.1) -> ProgressConfig:
    return ProgressConfig(url=url, token_path=str(token), interval_seconds=interval)
