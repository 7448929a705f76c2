"""A FineTuneJob, to be run on this machine: the same plan, other places and another world. Pure.

Called by `run`. The machine (cores, GPUs, a free port) is passed in.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune_api.resource import FineTuneJob
from finetune_api.run import DataSource, JobRef, Location, ProgressConfig, RunConfig, S3Config, TrackingConfig
from finetune_operator.plan import plan
from finetune_operator.settings import Settings


@dataclass(frozen=True)
class Machine:
    """What there is to train on."""

    cores: int
    gpus: int
    free_port: int


@dataclass(frozen=True)
class Overrides:
    """What the command line puts in place of the file's fields. Paths and URIs."""

    model: str | None = None
    dataset: str | None = None
    validation: str | None = None
    test: str | None = None
    output: str | None = None
    processes: int | None = None


@dataclass(frozen=True)
class LocalRun:
    """`notes` say, for people, what differs from a cluster."""

    config: RunConfig
    notes: tuple[str, ...]


class CannotRunHere(ValueError):
    """A field that has no meaning on this machine; the message names the option to give."""


def local_run(
    job: FineTuneJob,
    overrides: Overrides,
    machine: Machine,
    *,
    folder: Path,
    scratch_root: Path,
    progress: ProgressConfig,
    s3: S3Config,
) -> LocalRun:
    """`folder` is where relative paths start. Raises CannotRunHere, or plan's PlanError."""
    planned = plan(job, Settings())
    notes: list[str] = []
    device, processes = _world(planned, overrides, machine, notes)
    output = _location(overrides.output or f"{job.metadata.name}-output", folder)
    model = _replaced("--model", planned.model.location, overrides.model, folder, notes)
    train = _replaced("--dataset", planned.data.train, overrides.dataset, folder, notes)
    sources = () if overrides.dataset else tuple(_here(source, notes) for source in planned.data.sources)
    test = _replaced("--test", planned.data.test, overrides.test, folder, notes)
    validation = _replaced("--validation", planned.data.validation, overrides.validation, folder, notes)
    data = planned.data.model_copy(
        update={
            "train": train,
            "sources": sources,
            "test": test,
            "test_fraction": None if overrides.test else planned.data.test_fraction,
            "validation": validation,
            "validation_fraction": None if overrides.validation else planned.data.validation_fraction,
        }
    )
    uid = _identity(job, output, (model, train, *(source.location for source in sources), validation, test))
    config = planned.model_copy(
        update={
            "job": JobRef(namespace="local", name=job.metadata.name, uid=uid, attempt=1),
            "model": planned.model.model_copy(update={"location": model}),
            "data": data,
            "world": planned.world.model_copy(
                update={
                    "nodes": 1,
                    "processes_per_node": processes,
                    "device": device,
                    "threads_per_process": max(1, machine.cores // processes),
                    "master_address": "127.0.0.1",
                    "master_port": machine.free_port,
                }
            ),
            "output": output,
            "tracking": _tracking(planned),
            "progress": progress,
            "s3": s3,
            "provenance": planned.provenance.model_copy(update={"image": ""}),
            "scratch": str(scratch_root / f"{job.metadata.name}-{uid[:8]}"),
            "metrics_port": 0,
            "metrics_linger_seconds": 0.0,
        }
    )
    return LocalRun(RunConfig.model_validate(config.model_dump()), tuple(notes))


def _world(
    planned: RunConfig, overrides: Overrides, machine: Machine, notes: list[str]
) -> tuple[Literal["cpu", "cuda"], int]:
    wanted = planned.world.size
    device: Literal["cpu", "cuda"] = "cuda" if planned.world.device == "cuda" and machine.gpus else "cpu"
    if planned.world.device == "cuda" and device == "cpu":
        notes.append("resources.gpu: no GPU here, so it trains on the CPU")
    room = machine.gpus if device == "cuda" else machine.cores
    processes = overrides.processes or max(1, min(wanted, room))
    if device == "cuda" and processes > machine.gpus:
        raise CannotRunHere(f"--processes {processes}: there are {machine.gpus} GPUs; give at most that many")
    if processes > planned.training.global_batch_size:
        raise CannotRunHere(
            f"--processes {processes}: training.globalBatchSize is {planned.training.global_batch_size}, and every "
            "process needs an example; give fewer"
        )
    if processes != wanted:
        notes.append(f"{processes} processes here instead of {wanted}; the global batch stays as it is")
    return device, processes


def _replaced(
    option: str, planned: Location | None, given: str | None, folder: Path, notes: list[str]
) -> Location | None:
    if given is not None:
        return _location(given, folder)
    if planned is None:
        return None
    if planned.display.startswith("pvc://"):
        raise CannotRunHere(f"{planned.display} is a volume of a cluster; give {option} PATH")
    if planned.credentials is not None:
        note = "credentialsRef: Secrets aren't read here; keys come from the environment (AWS_*, HF_TOKEN)"
        if note not in notes:
            notes.append(note)
    return planned.model_copy(update={"credentials": None})


def _here(source: DataSource, notes: list[str]) -> DataSource:
    """A place of a mixture as this machine reads it."""
    location = _replaced("--dataset", source.location, None, Path(), notes)
    return source.model_copy(update={"location": location})


def _location(given: str, folder: Path) -> Location:
    """A path of this machine, or a URI as it is."""
    if "://" in given:
        return Location(uri=given, display=given)
    path = (folder / Path(given).expanduser()).resolve()
    return Location(uri=f"file://{path}", display=str(path))


def _tracking(planned: RunConfig) -> TrackingConfig:
    """Keys come from the environment."""
    asked = planned.tracking
    here = {
        name: tracker.model_copy(update={"credentials": None})
        for name, tracker in (("mlflow", asked.mlflow), ("wandb", asked.wandb))
        if tracker is not None
    }
    return asked.model_copy(update=here)


def _identity(job: FineTuneJob, output: Location, inputs: tuple[Location | None, ...]) -> str:
    """The same file with the same places is the same run: it goes on where it stopped. A changed recipe is not."""
    content = {
        "name": job.metadata.name,
        "spec": {key: value for key, value in job.spec.to_json().items() if key not in ("runPolicy", "resources")},
        "places": [place.uri for place in (output, *inputs) if place is not None],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"finetune-run:{digest}"))
