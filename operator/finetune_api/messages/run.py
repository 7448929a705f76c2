"""Defines RunConfig: everything that a trainer pod needs to know, decided before the pod exists.

It is an annotation of the pod, as JSON, and mounted at RUN_CONFIG_PATH. It contains no secrets:
credentials are paths of mounted files.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Model
from finetune_api.messages.rivals import Rivals
from finetune_api.names import SCRATCH_ROOT, TRAINER_METRICS_PORT
from finetune_api.resource import (
    CheckpointSpec,
    ColumnsSpec,
    EvaluationSpec,
    FullSpec,
    LoraSpec,
    TrainingSpec,
)
from finetune_api.spec.data import DataFormat
from finetune_api.spec.hardware import Offload, StrategyOption
from finetune_api.spec.outcome import DeletionPolicy
from finetune_api.spec.rendering import RenderingSpec


class Location(Model):
    """Locates remote or local files, as the trainer opens them."""

    uri: str = Field(
        description="hf://, s3://, gs://, az:// or file:// (a mounted volume claim is a file:// under /mnt/pvc)."
    )
    display: str = Field(description="What the user wrote; used in messages, manifests and status.")
    revision: str | None = Field(default=None, description="Revision of an hf:// location.")
    credentials: str | None = Field(default=None, description="Folder with one file per key of the Secret.")


class JobRef(Model):
    """Identifies the job and the attempt that a run belongs to."""

    namespace: str
    name: str
    uid: str
    attempt: int = Field(ge=1)


class StartConfig(Model):
    """Locates a checkpoint, or an adapter, of another job."""

    location: Location
    step: int | None = Field(default=None, description="Empty means the newest one.")
    use: Literal["trainingState", "weights"] = "trainingState"


class ModelConfig(Model):
    """Describes the base model."""

    location: Location
    size_bytes: int | None = Field(default=None, description="Size of its files. Empty means unknown.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "int8", "nf4"] = "none"
    checkpoint: StartConfig | None = Field(default=None, description="Where training starts. None means the base.")
    allowed_licenses: tuple[str, ...] = Field(default=(), description="Licenses that the job allows. Empty means any.")
    operator_licenses: tuple[str, ...] = Field(
        default=(), description="Licenses that the operator allows. Empty means any."
    )


class CacheConfig(Model):
    """Locates the cache of base models that pods share."""

    root: str
    max_bytes: int = Field(ge=1, description="Bytes of all models in it.")


class DataSource(Model):
    """Locates rows and says how they are read."""

    location: Location
    format: DataFormat = "auto"
    columns: ColumnsSpec | None = None
    weight: float = 1.0


class DataConfig(Model):
    """Describes the rows of all splits."""

    train: Location = Field(description="The training rows; with `sources`, the first source.")
    sources: tuple[DataSource, ...] = Field(
        default=(), description="Sources of training rows, if there are several; else empty."
    )
    validation: Location | None = None
    validation_fraction: float | None = None
    test: Location | None = None
    test_fraction: float | None = None
    format: DataFormat = "auto"
    columns: ColumnsSpec | None = None
    labels: tuple[str, ...] = ()
    min_label_probability: float = 0.0
    chat_template: str | None = None
    rendering: RenderingSpec = Field(
        default_factory=RenderingSpec, description="With the date of the job; without one, that of the clock."
    )
    max_sequence_length: int = 2048
    packing: bool = True
    shared_prefix: Literal["auto", "off"] = "auto"
    on_invalid: Literal["fail", "drop"] = "fail"

    def sources_of(self, split: str) -> tuple[DataSource, ...]:
        """Returns the sources of a split (train, validation, test).

        It is empty if the split has no files of its own.
        """
        if split == "train" and self.sources:
            return self.sources
        location = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        return (DataSource(location=location, format=self.format, columns=self.columns),) if location else ()


class WorldConfig(Model):
    """Describes the processes, and what is sharded across them."""

    nodes: int = Field(default=1, ge=1)
    processes_per_node: int = Field(default=1, ge=1)
    strategy: StrategyOption = "ddp"
    offload: Offload = "none"
    sequence_parallel_size: int = Field(default=1, ge=1, description="Consecutive ranks that share each packed row.")
    device: Literal["cpu", "cuda"] = "cpu"
    threads_per_process: int = Field(default=1, ge=1, description="CPU threads of one rank (OMP_NUM_THREADS).")
    master_address: str = "127.0.0.1"
    master_port: int = 29500

    @property
    def size(self) -> int:
        """The world size: the number of ranks."""
        return self.nodes * self.processes_per_node

    @property
    def data_size(self) -> int:
        """The number of groups of ranks among which the rows of a step are divided."""
        return self.size // self.sequence_parallel_size


class MlflowConfig(Model):
    """Configures an MLflow server."""

    uri: str
    experiment: str = "finetune-operator"
    registered_model: str = ""
    credentials: str | None = Field(default=None, description="Folder with one file per key of the Secret.")


class WandbConfig(Model):
    """Configures Weights & Biases."""

    project: str
    entity: str = ""
    mode: Literal["online", "offline"] = "online"
    credentials: str | None = Field(default=None, description="Folder with one file per key of the Secret.")


class TrackingConfig(Model):
    """Says where a run is recorded besides Prometheus."""

    mlflow: MlflowConfig | None = None
    tensorboard: bool = False
    wandb: WandbConfig | None = None
    servers: tuple[str, ...] | None = Field(
        default=None,
        description="Servers that the administrator allows. Empty means any, which gets the keys of a Secret only if "
        "the Secret names it; None means any.",
    )


class ProgressConfig(Model):
    """Says where rank 0's supervisor posts progress; the kubelet rotates the token file."""

    url: str
    token_path: str
    interval_seconds: float = 5.0
    authority: str = Field(
        default="", description="Certificates, in PEM, that the operator's is signed by. Empty means no TLS."
    )
    server_name: str = Field(default="", description="Name in the operator's certificate. Empty means the URL's host.")


Endpoints = Annotated[
    tuple[str, ...] | None,
    Field(description="Servers that a Secret may name instead. Empty means any with a public address; None means any."),
]


class S3Config(Model):
    """Configures the S3 endpoint; keys come from the credentials or from the pod's identity."""

    endpoint: str | None = None
    region: str = Field(
        default="", description="Empty means AWS_REGION or AWS_DEFAULT_REGION of the pod, else us-east-1."
    )
    allow_http: bool = False
    allowed_endpoints: Endpoints = None


class GcsConfig(Model):
    """Configures gs:// URIs; keys come from the credentials or from the pod's identity."""

    endpoint: str | None = Field(default=None, description="URL. Empty means Google's.")
    allow_http: bool = False
    allowed_endpoints: Endpoints = None


class AzureConfig(Model):
    """Configures az:// URIs; keys come from the credentials or from the pod's identity."""

    account: str = Field(default="", description="Name of the storage account, if a Secret names none.")
    endpoint: str | None = Field(default=None, description="URL. Empty means that of the account in Azure.")
    allow_http: bool = False
    allowed_endpoints: Endpoints = None


class Provenance(Model):
    """Records what produced the result; the manifest contains it unchanged."""

    image: str = ""
    operator_version: str = ""
    spec_digest: str = ""


class RunConfig(Model):
    """Configures one attempt of one job; `parse` inverts `to_json`."""

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
    existing: Literal["resume", "discard"] = "resume"
    inherits: bool = Field(
        default=True,
        description="Whether checkpoints of a deleted job of the same name may be taken over: only until this job has "
        "stored one.",
    )
    hold_seconds: float = Field(
        default=14400.0, ge=0, description="How long a result is held that the storage doesn't accept."
    )
    deletion_policy: DeletionPolicy = Field(default="Retain", description="What a cleanup deletes; for it alone.")
    recipe: dict[str, str] = Field(default_factory=dict, description="Digests of what decides the weights, by section.")
    signers: tuple[str, ...] | None = Field(
        default=None, description="Public keys of the pods of earlier attempts. None if no operator vouches for them."
    )
    token_signers: tuple[str, ...] | None = Field(
        default=None, description="Public keys of the preflight pods, which sign the tokens of the rows. None as above."
    )
    rivals: Rivals | None = Field(default=None, description="Who else could own the output. None if nobody knows.")
    merge: bool = Field(default=False, description="Also write base and adapter as one model.")
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    progress: ProgressConfig | None = None
    s3: S3Config = Field(default_factory=S3Config)
    gcs: GcsConfig = Field(default_factory=GcsConfig)
    azure: AzureConfig = Field(default_factory=AzureConfig)
    provenance: Provenance = Field(default_factory=Provenance)
    scratch: str = SCRATCH_ROOT
    scratch_bytes: int | None = Field(default=None, description="Size of the scratch disk. Empty means unknown.")
    model_cache: CacheConfig | None = None
    auto_scratch: bool = Field(default=False, description="The operator sizes the scratch disk by the model.")
    memory_bytes: int | None = Field(default=None, description="Memory of the pod. Empty means unknown.")
    auto_memory: bool = Field(default=False, description="The operator sizes the memory by the model.")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = TRAINER_METRICS_PORT
    metrics_linger_seconds: float = Field(default=0.0, description="How long /metrics is served after the end.")
    stall_seconds: int = 600
    checked: bool = Field(
        default=False, description="Whether a preflight pod has checked the inputs; else the training pods do."
    )
    preflight_seconds: int = Field(default=14400, description="How long all checks of a preflight pod may take.")
    memory_restarts: int = Field(default=0, ge=0, description="How many attempts have run out of memory so far.")
    grace_seconds: int = Field(
        default=120, description="Seconds from SIGTERM to SIGKILL; saving the checkpoint must fit into them."
    )

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens that are added to the vocabulary."""
        return self.lora.added_tokens if self.lora else ()


def parse(text: str | bytes) -> RunConfig:
    """Parses JSON. Raises pydantic.ValidationError, whose messages name the field."""
    return RunConfig.model_validate_json(text)
