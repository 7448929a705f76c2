"""RunConfig: everything a trainer pod needs to know, decided before the pod exists.

Built by finetune_operator.plan (pure), or by `finetune run`; carried as JSON in a pod annotation and read by the
supervisor from RUN_CONFIG_PATH. Holds no secret: credentials are paths of mounted files.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.model import Model
from finetune_api.names import SCRATCH_ROOT, TRAINER_METRICS_PORT
from finetune_api.resource import (
    CheckpointSpec,
    ColumnsSpec,
    EvaluationSpec,
    FullSpec,
    LoraSpec,
    TrainingSpec,
)
from finetune_api.spec_data import DataFormat


class Location(Model):
    """A remote or local place, as the trainer's `store` opens it."""

    uri: str = Field(description="hf://, s3:// or file:// (a mounted claim is a file:// under /mnt/pvc).")
    display: str = Field(description="What the user wrote; used in messages, manifests and status.")
    revision: str | None = Field(default=None, description="For hf://.")
    credentials: str | None = Field(default=None, description="Folder with one file a key of the Secret.")


class JobRef(Model):
    """Which job and attempt this run belongs to."""

    namespace: str
    name: str
    uid: str
    attempt: int = Field(ge=1)


class ModelConfig(Model):
    """The base model."""

    location: Location
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "int8", "nf4"] = "none"
    allowed_licenses: tuple[str, ...] = Field(default=(), description="By the job. Empty means any.")
    operator_licenses: tuple[str, ...] = Field(default=(), description="By the operator's settings. Empty means any.")


class DataSource(Model):
    """A place of training rows, and how they are read."""

    location: Location
    format: DataFormat = "auto"
    columns: ColumnsSpec | None = None
    weight: float = 1.0


class DataConfig(Model):
    """The rows."""

    train: Location = Field(description="The training rows; with `sources`, the first of them.")
    sources: tuple[DataSource, ...] = Field(default=(), description="Several places of training rows; else empty.")
    validation: Location | None = None
    validation_fraction: float | None = None
    test: Location | None = None
    test_fraction: float | None = None
    format: DataFormat = "auto"
    columns: ColumnsSpec | None = None
    labels: tuple[str, ...] = ()
    min_label_probability: float = 0.0
    chat_template: str | None = None
    max_sequence_length: int = 2048
    packing: bool = True
    shared_prefix: Literal["auto", "off"] = "auto"
    on_invalid: Literal["fail", "drop"] = "fail"

    def places(self, split: str) -> tuple[DataSource, ...]:
        """Where the rows of a split come from; none where it has none of its own."""
        if split == "train" and self.sources:
            return self.sources
        location = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        return (DataSource(location=location, format=self.format, columns=self.columns),) if location else ()


class WorldConfig(Model):
    """The processes and what is split between them."""

    nodes: int = Field(default=1, ge=1)
    processes_per_node: int = Field(default=1, ge=1)
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"] = "ddp"
    offload: Literal["none", "optimizer", "parameters"] = "none"
    device: Literal["cpu", "cuda"] = "cpu"
    threads_per_process: int = Field(default=1, ge=1, description="CPU threads of one rank (OMP_NUM_THREADS).")
    master_address: str = "127.0.0.1"
    master_port: int = 29500

    @property
    def size(self) -> int:
        """World size: the number of ranks."""
        return self.nodes * self.processes_per_node

    @property
    def splits_weights(self) -> bool:
        """Whether no rank holds the whole model, so that all have to take part in whatever is computed. Not of auto."""
        return self.strategy in ("zero3", "fsdp")


class MlflowConfig(Model):
    """An MLflow server."""

    uri: str
    experiment: str = "finetune-operator"
    registered_model: str = ""
    credentials: str | None = Field(default=None, description="Folder with one file a key of the Secret.")


class WandbConfig(Model):
    """Weights & Biases."""

    project: str
    entity: str = ""
    mode: Literal["online", "offline"] = "online"
    credentials: str | None = Field(default=None, description="Folder with one file a key of the Secret.")


class TrackingConfig(Model):
    """Where the course of training is recorded besides Prometheus."""

    mlflow: MlflowConfig | None = None
    tensorboard: bool = False
    wandb: WandbConfig | None = None


class ProgressConfig(Model):
    """Where rank 0's supervisor posts progress; the token file is rotated by the kubelet."""

    url: str
    token_path: str
    interval_seconds: float = 5.0


class S3Config(Model):
    """The administrator's S3 endpoint; keys come from credentials or the pod's identity."""

    endpoint: str | None = None
    region: str = "us-east-1"
    allow_http: bool = False


class Provenance(Model):
    """Recorded in the manifest as it is."""

    image: str = ""
    operator_version: str = ""
    spec_digest: str = ""


class RunConfig(Model):
    """One attempt of one job. Frozen; `to_json` and `parse` are inverse."""

    version: Literal[1] = 1
    job: JobRef
    model: ModelConfig
    data: DataConfig
    method: Literal["lora", "full"]
    lora: LoraSpec | None = None
    full: FullSpec | None = None
    training: TrainingSpec
    world: WorldConfig = Field(default_factory=WorldConfig)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    output: Location
    merge: bool = Field(default=False, description="Write base and adapter as one model, too.")
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    progress: ProgressConfig | None = None
    s3: S3Config = Field(default_factory=S3Config)
    provenance: Provenance = Field(default_factory=Provenance)
    scratch: str = SCRATCH_ROOT
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = TRAINER_METRICS_PORT
    metrics_linger_seconds: float = Field(
        default=0.0,
        description="How long /metrics is served after the end, so that the last values are scraped.",
    )
    stall_seconds: int = 600

    @property
    def added_tokens(self) -> tuple[str, ...]:
        return self.lora.added_tokens if self.lora else ()

    grace_seconds: int = Field(default=120, description="From SIGTERM to SIGKILL; the checkpoint must fit in it.")


def parse(text: str | bytes) -> RunConfig:
    """Raises pydantic.ValidationError whose messages name the field."""
    return RunConfig.model_validate_json(text)
