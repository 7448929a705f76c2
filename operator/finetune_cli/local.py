"""Plans a FineTuneJob for this machine: the cluster's plan with local paths and another world size.

The module is pure: the machine (cores, GPUs, a free port) and the environment are passed in.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune_api.messages.run import (
    AzureConfig,
    DataSource,
    GcsConfig,
    JobRef,
    Location,
    ProgressConfig,
    RunConfig,
    S3Config,
    TrackingConfig,
)
from finetune_api.resource import FineTuneJob
from finetune_operator.core.plan import plan
from finetune_operator.settings import Settings


@dataclass(frozen=True)
class Machine:
    """Describes the resources of this machine. `free_port` is a TCP port that nothing uses, and
    `today` is the date as YYYY-MM-DD."""

    cores: int
    gpus: int
    free_port: int
    today: str | None = None


@dataclass(frozen=True)
class Overrides:
    """Holds options of the command line that replace fields of the file.

    Inputs and output are paths or URIs.
    """

    model: str | None = None
    dataset: str | None = None
    validation: str | None = None
    test: str | None = None
    output: str | None = None
    processes: int | None = None


@dataclass(frozen=True)
class Workspace:
    """Describes what surrounds a local run.

    Relative paths start at `folder`; scratch folders are made in `scratch_root`.
    """

    folder: Path
    scratch_root: Path
    progress: ProgressConfig
    s3: S3Config
    gcs: GcsConfig = field(default_factory=GcsConfig)
    azure: AzureConfig = field(default_factory=AzureConfig)


@dataclass(frozen=True)
class LocalRun:
    """Holds a planned run. `notes` are sentences on how it differs from a run in a cluster."""

    config: RunConfig
    notes: tuple[str, ...]


class CannotRunHere(ValueError):
    """Reports a field that can't be used here; the message names the option that replaces it."""


def local_run(job: FineTuneJob, overrides: Overrides, machine: Machine, workspace: Workspace) -> LocalRun:
    """Plans the run. Raises CannotRunHere, or PlanError if the job is invalid."""
    planned = plan(job, Settings())
    folder = workspace.folder
    notes: list[str] = []
    device, processes = _world(planned, overrides, machine, notes)
    output = _location(overrides.output or f"{job.metadata.name}-output", folder)
    model = _replaced("--model", planned.model.location, overrides.model, folder, notes)
    train = _replaced("--dataset", planned.data.train, overrides.dataset, folder, notes)
    sources = () if overrides.dataset else tuple(_local_source(source, notes) for source in planned.data.sources)
    test = _replaced("--test", planned.data.test, overrides.test, folder, notes)
    validation = _replaced("--validation", planned.data.validation, overrides.validation, folder, notes)
    data = planned.data.model_copy(
        update={
            "train": train,
            "sources": sources,
            "test": test,
            "rendering": planned.data.rendering.model_copy(
                update={"date": planned.data.rendering.date or machine.today}
            ),
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
                    "sequence_parallel_size": _sharing_processes(planned, processes, notes),
                    "threads_per_process": max(1, machine.cores // processes),
                    "master_address": "127.0.0.1",
                    "master_port": machine.free_port,
                }
            ),
            "output": output,
            "tracking": _tracking(planned),
            "progress": workspace.progress,
            "s3": workspace.s3,
            "gcs": workspace.gcs,
            "azure": workspace.azure,
            "provenance": planned.provenance.model_copy(update={"image": ""}),
            "scratch": str(workspace.scratch_root / f"{job.metadata.name}-{uid[:8]}"),
            "model_cache": None,
            "scratch_bytes": None,  # resources.scratch limits a pod, not this machine
            "metrics_port": 0,
            "metrics_linger_seconds": 0.0,
        }
    )
    return LocalRun(RunConfig.model_validate(config.model_dump()), tuple(notes))


def s3_config(environment: Mapping[str, str], endpoint: str | None = None) -> S3Config:
    """Returns how to reach S3 from this machine.

    The endpoint is `endpoint` or AWS_ENDPOINT_URL, otherwise AWS. The storage itself reads the
    region from the environment.
    """
    endpoint = endpoint or environment.get("AWS_ENDPOINT_URL")
    return S3Config(endpoint=endpoint, allow_http=bool(endpoint and endpoint.startswith("http://")))


def gcs_config(environment: Mapping[str, str]) -> GcsConfig:
    """Returns how to reach gs:// from this machine: at GOOGLE_BASE_URL, otherwise at Google."""
    endpoint = environment.get("GOOGLE_BASE_URL")
    return GcsConfig(endpoint=endpoint, allow_http=bool(endpoint and endpoint.startswith("http://")))


def azure_config(environment: Mapping[str, str]) -> AzureConfig:
    """Returns how to reach az:// from this machine: at AZURE_STORAGE_ENDPOINT, otherwise at Azure.

    The storage itself reads the account from the environment.
    """
    endpoint = environment.get("AZURE_STORAGE_ENDPOINT")
    return AzureConfig(endpoint=endpoint, allow_http=bool(endpoint and endpoint.startswith("http://")))


def _world(
    planned: RunConfig, overrides: Overrides, machine: Machine, notes: list[str]
) -> tuple[Literal["cpu", "cuda"], int]:
    """Chooses the device and the number of processes."""
    planned_size = planned.world.size
    device: Literal["cpu", "cuda"] = "cuda" if planned.world.device == "cuda" and machine.gpus else "cpu"
    if planned.world.device == "cuda" and device == "cpu":
        notes.append("resources.gpu: this machine has no GPU, so the job trains on the CPU")
    available = machine.gpus if device == "cuda" else machine.cores
    processes = overrides.processes or max(1, min(planned_size, available))
    if device == "cuda" and processes > machine.gpus:
        raise CannotRunHere(f"--processes {processes}: give at most {machine.gpus}, the number of GPUs of this machine")
    if processes > planned.training.global_batch_size:
        raise CannotRunHere(
            f"--processes {processes}: training.globalBatchSize is {planned.training.global_batch_size}, and every "
            "process needs at least one example per step; give fewer"
        )
    if processes != planned_size:
        notes.append(f"{processes} processes instead of {planned_size}; the global batch size is unchanged")
    return device, processes


def _sharing_processes(planned: RunConfig, processes: int, notes: list[str]) -> int:
    """Returns how many of the processes share each row: as many of the planned ones as possible."""
    planned_size = planned.world.sequence_parallel_size
    size = math.gcd(planned_size, processes)
    if size != planned_size:
        notes.append(f"distribution.sequenceParallelSize: {size} instead of {planned_size}; losses are unchanged")
    return size


def _replaced(
    option: str, planned: Location | None, override: str | None, folder: Path, notes: list[str]
) -> Location | None:
    """Returns the overriding location, or the planned one as this machine can read it."""
    if override is not None:
        return _location(override, folder, of_rows=option != "--model")
    if planned is None:
        return None
    if planned.display.startswith(("pvc://", "volume://")):
        raise CannotRunHere(f"{planned.display} is a volume of a cluster and can't be read here; give {option} PATH")
    if planned.credentials is not None:
        note = (
            "credentialsRef: Secrets can't be read here; keys come from the environment (AWS_*, GOOGLE_*, AZURE_*, "
            "HF_TOKEN)"
        )
        if note not in notes:
            notes.append(note)
    return planned.model_copy(update={"credentials": None})


def _local_source(source: DataSource, notes: list[str]) -> DataSource:
    """Returns a source of a mixture as this machine can read it."""
    location = _replaced("--dataset", source.location, None, Path(), notes)
    return source.model_copy(update={"location": location})


def _location(path_or_uri: str, folder: Path, *, of_rows: bool = False) -> Location:
    """Resolves a path on this machine; leaves a URI unchanged.

    The location of rows ends with a slash if it is a folder.
    """
    if "://" in path_or_uri:
        return Location(uri=path_or_uri, display=path_or_uri)
    path = (folder / Path(path_or_uri).expanduser()).resolve()
    slash = "/" if of_rows and path.is_dir() else ""
    return Location(uri=f"file://{path}{slash}", display=f"{path}{slash}")


def _tracking(planned: RunConfig) -> TrackingConfig:
    """Removes the Secrets; trackers find their keys in the environment."""
    tracking = planned.tracking
    without_secrets = {
        name: tracker.model_copy(update={"credentials": None})
        for name, tracker in (("mlflow", tracking.mlflow), ("wandb", tracking.wandb))
        if tracker is not None
    }
    return tracking.model_copy(update=without_secrets)


def _identity(job: FineTuneJob, output: Location, inputs: tuple[Location | None, ...]) -> str:
    """Returns a UID that depends on the recipe, the inputs and the output.

    The same file with the same locations is the same run, so it resumes where it stopped. A changed
    recipe starts a new run.
    """
    content = {
        "name": job.metadata.name,
        "spec": {key: value for key, value in job.spec.to_json().items() if key not in ("runPolicy", "resources")},
        "places": [location.uri for location in (output, *inputs) if location is not None],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"finetune-run:{digest}"))
