"""Runs our own trainer as a pod does: the ranks on a scratch folder, with everything on `auto`.

The run has three epochs, like a user's, so that decisions that depend on its length are the same.
The trainer's own stop flag ends it after enough steps. The first step is the warm-up.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.trainer import processes

from finetune_api import names
from finetune_api.messages import events
from finetune_api.messages.run import CheckpointSpec, DataConfig, JobRef, Location, ModelConfig, RunConfig, WorldConfig
from finetune_api.resource import EvaluationSpec, LoraSpec, TrainingSpec
from finetune_trainer.paths import Paths

ROOT = Path(__file__).resolve().parents[2]
LEARNING_RATE = 2e-4
DROPOUT = 0.05


@dataclass(frozen=True)
class RunRequest:
    """A run. Its steps are measured for `seconds`; 0 lets it run to its end."""

    model: Path
    rows: Path
    global_batch: int
    longest: int
    seconds: float
    timeout: float
    ranks: int = 1
    threads: int = 2
    device: str = "cpu"
    training: Mapping[str, Any] = field(default_factory=dict)
    validation: float | None = None
    dropout: float = DROPOUT


@dataclass(frozen=True)
class RunRecord:
    """The events of a run, and the time and memory of its processes.

    `began` is in seconds since the epoch; `log` is the end of the processes' log.
    """

    events: tuple[dict[str, Any], ...]
    ended: processes.Ended
    began: float
    log: str

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Returns the events of that type, in order."""
        return [event for event in self.events if event["type"] == kind]

    @property
    def decisions(self) -> dict[str, str]:
        """Each decision's choice and reason, by topic."""
        return {event["topic"]: f"{event['choice']} ({event['reason']})" for event in self.all("decision")}

    @property
    def choices(self) -> dict[str, str]:
        """Each decision's choice, by topic."""
        return {event["topic"]: event["choice"] for event in self.all("decision")}


class RunFailed(Exception):
    """The run failed or had too few steps. The message has its errors or the end of its log."""


def run(request: RunRequest, *, again: bool = False) -> RunRecord:
    """Runs the trainer's ranks. Raises RunFailed.

    With `again` they run twice on one scratch folder, for one step, and the second run counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2 if again else 1):
            record = _run(request, Path(folder), stop_after=1 if again else None)
        return record


def supervised(request: RunRequest) -> RunRecord:
    """Runs the supervisor, with all of a pod's work from fetching to the upload into a folder.

    Raises RunFailed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scratch").mkdir()
        run = _config(request, folder / "scratch").model_copy(
            update={
                "model": ModelConfig(location=_location(f"file://{request.model.resolve()}")),
                "output": _location(f"file://{folder}/out"),
                "metrics_port": 0,
            }
        )
        data = run.data.model_copy(update={"train": _location(f"file://{request.rows.resolve()}")})
        run = run.model_copy(update={"data": data})
        (folder / "run.json").write_text(json.dumps(run.to_json()))
        environment = {
            **processes.environment(request.threads),
            "PYTHONPATH": f"{ROOT}/operator:{ROOT}/trainer_image",
            names.ENV_RUN_CONFIG: str(folder / "run.json"),
            names.ENV_TERMINATION_LOG: str(folder / "result.json"),
            names.ENV_NODE_RANK: "0",
            "FINETUNE_LOG_FORMAT": "text",
        }
        log, began = folder / "log", time.time()
        command = [sys.executable, "-m", "finetune_trainer"]
        ended = processes.run([(command, environment)], log=log, timeout=request.timeout)
        if any(ended.codes):
            raise RunFailed(f"code {ended.codes[0]}: {processes.tail(log)}")
        return RunRecord(tuple(_events(Paths(folder / "scratch"))), ended, began, processes.tail(log))


def _run(request: RunRequest, folder: Path, stop_after: int | None = None) -> RunRecord:
    paths = _prepare(request, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "finetune_trainer.rank"]
    commands = [
        (
            command,
            {
                **processes.environment(request.threads, device=request.device, keeps_memory=True),
                "PYTHONPATH": f"{ROOT}/operator:{ROOT}/trainer_image",
                "FINETUNE_SCRATCH": str(folder),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(request.ranks),
                "LOCAL_WORLD_SIZE": str(request.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(request.ranks)
    ]
    log = folder / "log"
    began = time.time()

    def tick() -> None:
        if paths.stop.exists() or (request.seconds <= 0 and stop_after is None):
            return
        steps = [event for event in _events(paths) if event["type"] == "step"]
        if stop_after is not None:
            enough = len(steps) >= stop_after
        else:
            waited = time.time() - steps[0]["time"] if steps else 0.0
            # At least two measured steps, or one if a step takes longer than the window.
            enough = len(steps) >= 3 and steps[-1]["time"] - steps[0]["time"] >= request.seconds
            enough = enough or (len(steps) == 2 and waited >= 2 * request.seconds)
        if enough:
            paths.stop.touch()

    ended = processes.run(commands, log=log, timeout=request.timeout, tick=tick)
    record = RunRecord(tuple(_events(paths)), ended, began, processes.tail(log))
    if any(ended.codes) or (stop_after is None and len(record.all("step")) < 2):
        errors = [f"{event['reason']}: {event['message']}" for event in record.all("error")]
        raise RunFailed(f"codes {ended.codes}; {'; '.join(errors) or record.log}")
    return record


def _events(paths: Paths) -> Iterator[dict[str, Any]]:
    path = paths.rank_events(0)
    for line in path.read_text().splitlines() if path.is_file() else ():
        event = events.decode(line)
        if event is not None:
            yield event.model_dump()


def _prepare(request: RunRequest, folder: Path) -> Paths:
    """Fills the scratch folder as the supervisor does; an existing token cache stays."""
    paths = Paths(folder)
    for path in (paths.rank_events(0), paths.stop):
        path.unlink(missing_ok=True)
    for needed in (paths.data("train").parent, paths.events, paths.checkpoints, paths.rank_log(0).parent):
        needed.mkdir(parents=True, exist_ok=True)
    if not paths.model.exists():
        paths.model.symlink_to(request.model.resolve())
        paths.data("train").symlink_to(request.rows.resolve())
    paths.run_config.write_text(json.dumps(_config(request, folder).to_json()))
    return paths


def _config(request: RunRequest, scratch: Path) -> RunConfig:
    return RunConfig(
        job=JobRef(namespace="bench", name="trainer", uid="u-1", attempt=1),
        model=ModelConfig(location=_location("file:///model")),
        data=DataConfig(
            train=_location("file:///rows"), max_sequence_length=request.longest, validation_fraction=request.validation
        ),
        method="lora",
        lora=LoraSpec(rank=16, alpha=32, dropout=request.dropout, target_modules=("q_proj", "v_proj")),
        training=TrainingSpec(
            **{
                "global_batch_size": request.global_batch,
                "learning_rate": LEARNING_RATE,
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                **request.training,
            }
        ),
        world=WorldConfig(processes_per_node=request.ranks, threads_per_process=request.threads, device=request.device),  # type: ignore[arg-type]
        checkpoint=CheckpointSpec(),
        evaluation=EvaluationSpec(),
        output=_location("file:///out"),
        scratch=str(scratch),
    )


def _location(uri: str) -> Location:
    return Location(uri=uri, display=uri)


@dataclass(frozen=True)
class Speed:
    """The speed of the steps after the first.

    `seconds` is the wall time from the end of the first step to the end of the last, with
    everything in between.
    """

    seconds: float
    steps: int
    tokens: int
    labels: int
    by_step: tuple[float, ...]
    parts: Mapping[str, float]
    padding_share: float
    computed_per_seen: float


def speed(record: RunRecord) -> Speed:
    """Computes the speed from the events of a run."""
    steps = record.all("step")
    first, rest = steps[0], steps[1:]
    (plan,) = record.all("plan")
    kinds = {name for step in rest for name in step["seconds"] if name != "total"}
    total = sum(step["seconds"]["total"] for step in rest)
    parts = {name: sum(step["seconds"].get(name, 0.0) for step in rest) / total for name in sorted(kinds)}
    return Speed(
        seconds=rest[-1]["time"] - first["time"],
        steps=len(rest),
        tokens=sum(step["tokens"] for step in rest),
        labels=sum(step["label_tokens"] for step in rest),
        by_step=_rates(steps),
        parts=parts,
        padding_share=plan["padding_share"],
        computed_per_seen=plan["computed_share"] / (1 - plan["padding_share"]),
    )


def _rates(steps: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    return tuple(after["tokens"] / (after["time"] - before["time"]) for before, after in itertools.pairwise(steps))
