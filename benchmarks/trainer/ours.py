"""Our own trainer, as a pod runs it: the ranks' process on a scratch folder, everything on `auto`.

The run is three epochs long, as a user's would be (so what depends on its length is decided as for a user), and is
stopped by the trainer's own stop flag once enough steps were seen. The first step is the warm-up.
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

from finetune_api import events, names
from finetune_api.resource import EvaluationSpec, LoraSpec, TrainingSpec
from finetune_api.run import CheckpointSpec, DataConfig, JobRef, Location, ModelConfig, RunConfig, WorldConfig
from finetune_trainer.paths import Paths

ROOT = Path(__file__).resolve().parents[2]
LEARNING_RATE = 2e-4
DROPOUT = 0.05


@dataclass(frozen=True)
class Asked:
    """A run. `seconds`: how long steps are measured; 0 lets the run end by itself."""

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
class Seen:
    """What a run told, as its events' own fields, and what the process took."""

    events: tuple[dict[str, Any], ...]
    ended: processes.Ended
    began: float
    log: str

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    @property
    def decisions(self) -> dict[str, str]:
        return {event["topic"]: f"{event['choice']} ({event['reason']})" for event in self.all("decision")}

    @property
    def choices(self) -> dict[str, str]:
        return {event["topic"]: event["choice"] for event in self.all("decision")}


class Failed(Exception):
    """The run didn't get far enough; the message holds the end of its log."""


def run(asked: Asked, *, again: bool = False) -> Seen:
    """Raises Failed. With `again` it is run twice on one scratch folder for one step, and the second run counts."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2 if again else 1):
            seen = _run(asked, Path(folder), stop_after=1 if again else None)
        return seen


def supervised(asked: Asked) -> Seen:
    """The whole of a pod's work, from fetching to the upload (into a folder), by the supervisor. Raises Failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scratch").mkdir()
        run = _config(asked, folder / "scratch").model_copy(
            update={
                "model": ModelConfig(location=_place(f"file://{asked.model.resolve()}")),
                "output": _place(f"file://{folder}/out"),
                "metrics_port": 0,
            }
        )
        data = run.data.model_copy(update={"train": _place(f"file://{asked.rows.resolve()}")})
        run = run.model_copy(update={"data": data})
        (folder / "run.json").write_text(json.dumps(run.to_json()))
        environment = {
            **processes.environment(asked.threads),
            "PYTHONPATH": f"{ROOT}/operator:{ROOT}/trainer_image",
            names.ENV_RUN_CONFIG: str(folder / "run.json"),
            names.ENV_TERMINATION_LOG: str(folder / "result.json"),
            names.ENV_NODE_RANK: "0",
            "FINETUNE_LOG_FORMAT": "text",
        }
        log, began = folder / "log", time.time()
        command = [sys.executable, "-m", "finetune_trainer"]
        ended = processes.run([(command, environment)], log=log, timeout=asked.timeout)
        if any(ended.codes):
            raise Failed(f"code {ended.codes[0]}: {processes.tail(log)}")
        return Seen(tuple(_events(Paths(folder / "scratch"))), ended, began, processes.tail(log))


def _run(asked: Asked, folder: Path, stop_after: int | None = None) -> Seen:
    paths = _prepare(asked, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "finetune_trainer.rank"]
    commands = [
        (
            command,
            {
                **processes.environment(asked.threads, device=asked.device, keeps_memory=True),
                "PYTHONPATH": f"{ROOT}/operator:{ROOT}/trainer_image",
                "FINETUNE_SCRATCH": str(folder),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(asked.ranks),
                "LOCAL_WORLD_SIZE": str(asked.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(asked.ranks)
    ]
    log = folder / "log"
    began = time.time()

    def tick() -> None:
        if paths.stop.exists() or (asked.seconds <= 0 and stop_after is None):
            return
        steps = [event for event in _events(paths) if event["type"] == "step"]
        if stop_after is not None:
            enough = len(steps) >= stop_after
        else:
            waited = time.time() - steps[0]["time"] if steps else 0.0
            # Two steps at least; one where a step takes longer than the whole window.
            enough = len(steps) >= 3 and steps[-1]["time"] - steps[0]["time"] >= asked.seconds
            enough = enough or (len(steps) == 2 and waited >= 2 * asked.seconds)
        if enough:
            paths.stop.touch()

    ended = processes.run(commands, log=log, timeout=asked.timeout, tick=tick)
    seen = Seen(tuple(_events(paths)), ended, began, processes.tail(log))
    if any(ended.codes) or (stop_after is None and len(seen.all("step")) < 2):
        errors = [f"{event['reason']}: {event['message']}" for event in seen.all("error")]
        raise Failed(f"codes {ended.codes}; {'; '.join(errors) or seen.log}")
    return seen


def _events(paths: Paths) -> Iterator[dict[str, Any]]:
    path = paths.rank_events(0)
    for line in path.read_text().splitlines() if path.is_file() else ():
        event = events.decode(line)
        if event is not None:
            yield event.model_dump()


def _prepare(asked: Asked, folder: Path) -> Paths:
    """Fills the scratch folder as the supervisor does; leaves a token cache that is there."""
    paths = Paths(folder)
    for path in (paths.rank_events(0), paths.stop):
        path.unlink(missing_ok=True)
    for made in (paths.data("train").parent, paths.events, paths.checkpoints, paths.rank_log(0).parent):
        made.mkdir(parents=True, exist_ok=True)
    if not paths.model.exists():
        paths.model.symlink_to(asked.model.resolve())
        paths.data("train").symlink_to(asked.rows.resolve())
    paths.run_config.write_text(json.dumps(_config(asked, folder).to_json()))
    return paths


def _config(asked: Asked, scratch: Path) -> RunConfig:
    return RunConfig(
        job=JobRef(namespace="bench", name="trainer", uid="u-1", attempt=1),
        model=ModelConfig(location=_place("file:///model")),
        data=DataConfig(
            train=_place("file:///rows"), max_sequence_length=asked.longest, validation_fraction=asked.validation
        ),
        method="lora",
        lora=LoraSpec(rank=16, alpha=32, dropout=asked.dropout, target_modules=("q_proj", "v_proj")),
        training=TrainingSpec(
            **{
                "global_batch_size": asked.global_batch,
                "learning_rate": LEARNING_RATE,
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                **asked.training,
            }
        ),
        world=WorldConfig(processes_per_node=asked.ranks, threads_per_process=asked.threads, device=asked.device),  # type: ignore[arg-type]
        checkpoint=CheckpointSpec(),
        evaluation=EvaluationSpec(),
        output=_place("file:///out"),
        scratch=str(scratch),
    )


def _place(uri: str) -> Location:
    return Location(uri=uri, display=uri)


@dataclass(frozen=True)
class Speed:
    """Of the steps after the first: wall time from its end to the end of the last, with all that lies between."""

    seconds: float
    steps: int
    tokens: int
    labels: int
    by_step: tuple[float, ...]
    parts: Mapping[str, float]
    padding_share: float
    computed_per_seen: float


def speed(seen: Seen) -> Speed:
    steps = seen.all("step")
    first, rest = steps[0], steps[1:]
    (plan,) = seen.all("plan")
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
