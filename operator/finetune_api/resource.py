"""The FineTuneJob resource, v1alpha1: what a user writes. The CRD, `kubectl explain` and docs/reference.md are
generated from this file (`make generate`). Defaults live here and nowhere else; the operator never writes spec.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.model import LenientModel, Model, Rule, as_admitted
from finetune_api.names import API_VERSION, KIND, MAX_NAME_LENGTH
from finetune_api.status import Status


def _not_yet(field: str, cel: str, holds: Any, what: str, instead: str) -> Rule:
    return Rule(field=field, message=f"{what} is not supported yet; {instead}", cel=cel, holds=holds)


def _clean_uri() -> Rule:
    return Rule(
        field="uri",
        message="must not hold '..', '.' or empty path segments",
        cel="!has(self.uri) || !self.uri.matches('^[a-z0-9]+://.*//|/[.]{1,2}(/|$)')",
        holds=lambda m: m.uri is None or not s.has_parent_segment(m.uri),
    )


_REMOTE = (
    "gs:// and az://",
    "use s3://, hf:// or pvc://",
)

_RESERVED = ("finetune-operator.io/", "batch.kubernetes.io/", "app.kubernetes.io/")


class SecretRef(Model):
    """Names a Secret in the job's own namespace."""

    name: s.SecretName = Field(
        description="Name of a Secret in this namespace. Its keys are mounted as files into the pods; the operator "
        "never reads it. Known keys: HF_TOKEN; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, "
        "AWS_REGION, AWS_ENDPOINT_URL."
    )


class BaseModelSpec(Model):
    """The model that training starts from."""

    uri: s.ModelUri = Field(
        description="Where the base model lies: hf://owner/name, s3://bucket/prefix or pvc://claim/path. A folder "
        "with config.json, safetensors weights and a tokenizer."
    )
    revision: s.Revision | None = Field(
        default=None,
        description="Branch, tag or commit of an hf:// model. Empty means the default branch; the commit that was "
        "resolved is in status.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the weights in memory. auto probes the hardware: bfloat16 where it is fast, "
        "else float32. LoRA matrices are always float32.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none", description="Quantise the frozen base (QLoRA): none, int8 or nf4."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that ships with the model. Only an administrator may allow it.",
    )
    credentials_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the credentials for uri. Empty means anonymous or the pod's identity.",
    )

    rules = (
        _clean_uri(),
        _not_yet("uri", "!self.uri.matches('^(gs|az)://')",
                 lambda m: not m.uri.startswith(("gs://", "az://")), *_REMOTE),
        _not_yet("dtype", "self.dtype != 'float16'", lambda m: m.dtype != "float16",
                 "float16", "use auto, bfloat16 or float32"),
        _not_yet("quantization", "self.quantization == 'none'", lambda m: m.quantization == "none",
                 "a quantised base", "use none"),
        _not_yet("trustRemoteCode", "!self.trustRemoteCode", lambda m: not m.trust_remote_code,
                 "code that ships with a model", "use a model of a family that transformers knows"),
        Rule("revision", "is for hf:// models only; for other places the content's digest is recorded",
             "!has(self.revision) || self.uri.startsWith('hf://')",
             lambda m: m.revision is None or m.uri.startswith("hf://")),
    )  # fmt: skip


class ValidationSpec(Model):
    """Rows that are never trained on, used for the eval loss during training: a share, or a file of their own."""

    fraction: float | None = Field(
        default=None, gt=0, lt=0.5,
        description="Share of the training rows that is held out, chosen by the seed. More than 0, less than 0.5.",
    )  # fmt: skip
    uri: s.DataUri | None = Field(default=None, description="A file of held-out rows, read like dataset.uri.")

    rules = (
        Rule("fraction", "give either fraction or uri, exactly one", "has(self.fraction) != has(self.uri)",
             lambda m: (m.fraction is None) != (m.uri is None)),
        _clean_uri(),
        _not_yet("uri", "!has(self.uri) || !self.uri.matches('^(gs|az)://')",
                 lambda m: m.uri is None or not m.uri.startswith(("gs://", "az://")), *_REMOTE),
    )  # fmt: skip


class TestSpec(Model):
    """Rows that decide nothing: their loss is reported before and after training."""

    __test__ = False  # not a pytest class

    uri: s.DataUri = Field(description="A file of rows, read like dataset.uri.")

    rules = (
        _clean_uri(),
        _not_yet("uri", "!self.uri.matches('^(gs|az)://')",
                 lambda m: not m.uri.startswith(("gs://", "az://")), *_REMOTE),
    )  # fmt: skip


class DatasetSpec(Model):
    """The examples to learn from."""

    uri: s.DataUri = Field(
        description="A JSON-lines file: s3://bucket/key, pvc://claim/path or hf://owner/dataset/file."
    )
    credentials_ref: SecretRef | None = Field(
        default=None, description="Secret with the credentials for the data set's URIs."
    )
    format: Literal["auto", "prompt-completion", "messages", "text", "label-studio", "snorkel"] = Field(
        default="auto",
        description="Shape of a row. auto looks at the first row's keys: prompt and completion, or messages (a "
        "list of role and content).",
    )
    validation: ValidationSpec | None = Field(default=None, description="Held-out rows for the eval loss.")
    test: TestSpec | None = Field(default=None, description="Held-out rows, measured before and after training.")
    max_sequence_length: int = Field(
        default=2048, ge=8, le=1048576,
        description="Longest row, in tokens. A longer row's completion is cut at the end; a row whose prompt alone "
        "is that long has nothing left to learn and is treated by onInvalid.",
    )  # fmt: skip
    packing: bool = Field(
        default=True,
        description="Put several short rows into one sequence, so that little padding is computed. No row sees "
        "another one, so the loss is the same.",
    )
    on_invalid: Literal["fail", "drop"] = Field(
        default="fail",
        description="What happens to a row that can't be used: fail stops before training and names the rows, drop "
        "leaves them out and counts them.",
    )

    rules = (
        _clean_uri(),
        _not_yet("uri", "!self.uri.matches('^(gs|az)://')",
                 lambda m: not m.uri.startswith(("gs://", "az://")), *_REMOTE),
        _not_yet("format", "self.format in ['auto', 'prompt-completion', 'messages']",
                 lambda m: m.format in ("auto", "prompt-completion", "messages"),
                 "this format", "use auto, prompt-completion or messages"),
    )  # fmt: skip


class LoraSpec(Model):
    """Low-rank adapters (Hu et al. 2021): the update of a weight is (alpha / rank) * B A."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the update. 1 to 1024.")
    alpha: int = Field(default=32, ge=1, le=4096, description="Scale of the update: it is multiplied by alpha / rank.")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout before the first matrix. 0 to below 1.")
    target_modules: Annotated[tuple[s.ModuleName, ...], Field(min_length=1, max_length=64)] = Field(
        default=("q_proj", "v_proj"),
        description="Names of the linear layers that get an adapter, as in the model's code; all-linear means "
        "every one but the output layer.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(default="none", description="Which biases are trained too.")

    rules = (_not_yet("bias", "self.bias == 'none'", lambda m: m.bias == "none", "training biases", "use none"),)


class MethodSpec(Model):
    """What is trained: low-rank adapters, or all weights."""

    type: Literal["lora", "full"] = Field(description="lora trains adapters beside a frozen base; full trains all.")
    lora: LoraSpec | None = Field(default=None, description="Settings of the adapters. Required with type lora.")

    rules = (
        Rule("lora", "is required when type is lora ({} takes the defaults)",
             "self.type != 'lora' || has(self.lora)", lambda m: m.type != "lora" or m.lora is not None),
        Rule("lora", "has no meaning when type is full; remove it",
             "self.type != 'full' || !has(self.lora)", lambda m: m.type != "full" or m.lora is None),
    )  # fmt: skip


class EarlyStoppingSpec(Model):
    """Stop when the eval loss no longer falls."""

    patience: int = Field(
        default=3, ge=1, le=1000, description="Evaluations without a better eval loss before it stops."
    )


class TrainingSpec(Model):
    """The recipe."""

    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Passes over the data. Either epochs or maxSteps; 3 if neither.",
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=100000000, description="Optimizer steps. Either epochs or maxSteps."
    )
    global_batch_size: int = Field(
        default=64, ge=1, le=1048576,
        description="Examples per optimizer step, whatever the number of GPUs.",
    )  # fmt: skip
    micro_batch_size: s.AutoOrPositive = Field(
        default="auto",
        description="Examples (with packing: rows of maxSequenceLength tokens) that one GPU computes at once. auto "
        "takes what fits. It changes speed and memory, never the result.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Peak learning rate. More than 0, at most 1.")
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Course of the learning rate after warm-up: constant, linear or cosine to 0.",
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="Share of all steps in which the learning rate rises from 0. 0 to 1.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"] = Field(
        default="adamw", description="The optimizer. adamw is AdamW with betas 0.9 and 0.999, epsilon 1e-8."
    )
    weight_decay: float = Field(default=0.001, ge=0, le=1, description="Decoupled weight decay. 0 to 1.")
    max_grad_norm: float = Field(
        default=0.3,
        ge=0,
        le=1000000,
        description="Gradients are scaled down to this global norm. 0 means never.",
    )
    eval_every_steps: int = Field(
        default=500, ge=0, le=100000000,
        description="Optimizer steps between evaluations on the validation rows. 0 means only at the end.",
    )  # fmt: skip
    early_stopping: EarlyStoppingSpec | None = Field(
        default=None,
        description="Stop when the eval loss no longer falls. Empty means never. Needs validation rows.",
    )
    keep_best: bool = Field(
        default=True,
        description="Write the weights with the lowest eval loss instead of the last ones. Without validation rows "
        "the last ones are written.",
    )
    seed: int = Field(
        default=42, ge=0, le=4294967295, description="Seed of data order, adapter initialisation and dropout."
    )

    rules = (
        Rule("maxSteps", "give either epochs or maxSteps, not both",
             "!(has(self.epochs) && has(self.maxSteps))", lambda m: m.epochs is None or m.max_steps is None),
        _not_yet("optimizer", "self.optimizer == 'adamw'", lambda m: m.optimizer == "adamw",
                 "this optimizer", "use adamw"),
        Rule("microBatchSize", "must not be larger than globalBatchSize",
             "type(self.microBatchSize) != int || self.microBatchSize <= self.globalBatchSize",
             lambda m: not isinstance(m.micro_batch_size, int) or m.micro_batch_size <= m.global_batch_size),
    )  # fmt: skip


class DistributionSpec(Model):
    """On how many processes, and what is split between them."""

    nodes: int = Field(default=1, ge=1, le=1024, description="Pods, one a node.")
    processes_per_node: int = Field(
        default=1, ge=1, le=16, description="Processes in a pod, one a GPU. As many GPUs are asked for."
    )
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"] = Field(
        default="auto",
        description="ddp copies everything to each process; zero1 splits optimizer state, zero2 gradients too, zero3 "
        "weights too (DeepSpeed). auto takes ddp for LoRA and zero2 for full training.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none", description="Move optimizer state, or parameters too, to the host's memory."
    )

    rules = (
        _not_yet("strategy", "self.strategy != 'fsdp'", lambda m: m.strategy != "fsdp",
                 "fsdp", "use auto, ddp, zero1, zero2 or zero3"),
        _not_yet("offload", "self.offload == 'none'", lambda m: m.offload == "none", "offload", "use none"),
    )  # fmt: skip


class GpuSpec(Model):
    """The kind of GPU."""

    name: s.ResourceName = Field(
        default="nvidia.com/gpu", description="Extended resource that the pods ask for, one a process."
    )


def _quantity(field: str) -> str:
    return f"quantity(string(self.{field}))"


def _more_than_nothing(field: str) -> Rule:
    attribute = {"sharedMemory": "shared_memory"}.get(field, field)
    return Rule(
        field=field,
        message="must be more than 0",
        cel=f"{_quantity(field)}.isGreaterThan(quantity('0'))",
        holds=lambda m: s.quantity_value(getattr(m, attribute)) > 0,
    )


class ResourcesSpec(Model):
    """What one pod asks for; requests and limits are the same."""

    gpu: GpuSpec | None = Field(
        default=None, description="Ask for one GPU of this kind per process. Empty means training on the CPU."
    )
    cpu: s.Quantity = Field(default="4", description="Cores of a pod.")
    memory: s.Quantity = Field(default="16Gi", description="Memory of a pod, in bytes with a suffix such as Gi.")
    shared_memory: s.Quantity = Field(
        default="1Gi", description="Size of /dev/shm, counted within memory. NCCL and data loaders use it."
    )
    scratch: s.Quantity = Field(
        default="20Gi", description="Local disk of a pod for the model, the data and one checkpoint."
    )

    rules = (
        *(_more_than_nothing(field) for field in ("cpu", "memory", "sharedMemory", "scratch")),
        Rule("sharedMemory", "must be less than memory, within which it is counted",
             f"{_quantity('sharedMemory')}.isLessThan({_quantity('memory')})",
             lambda m: s.quantity_value(m.shared_memory) < s.quantity_value(m.memory)),
    )  # fmt: skip


class CheckpointSpec(Model):
    """How often the state is saved, so that a restart loses little."""

    every: s.AutoOrPositive = Field(
        default="auto", description="Optimizer steps between checkpoints; auto is a tenth of the run."
    )
    keep: int = Field(default=2, ge=1, le=100, description="Checkpoints kept in the destination while training.")


class OutputSpec(Model):
    """Where the result goes."""

    uri: s.OutputUri = Field(
        description="Folder for the adapter or the model: s3://bucket/prefix or pvc://claim/path. Exactly here; a "
        "folder that holds another job's result is refused."
    )
    credentials_ref: SecretRef | None = Field(default=None, description="Secret with the credentials for uri.")
    merge: bool = Field(default=False, description="Also write base and adapter merged into one model.")

    rules = (
        _clean_uri(),
        _not_yet("uri", "!self.uri.matches('^(gs|az)://')",
                 lambda m: not m.uri.startswith(("gs://", "az://")), *_REMOTE),
        _not_yet("merge", "!self.merge", lambda m: not m.merge, "a merged model", "merge with PEFT after the job"),
    )  # fmt: skip


class EvaluationSpec(Model):
    """What is measured on the test rows besides the loss."""

    metrics: Annotated[tuple[Literal["rouge", "bleu", "accuracy"], ...], Field(max_length=8)] = Field(
        default=(), description="Scores of generated answers."
    )
    samples: int = Field(
        default=0, ge=0, le=1000,
        description="Test prompts that are answered before and after training, for people to read.",
    )  # fmt: skip
    max_new_tokens: int = Field(default=64, ge=1, le=4096, description="Longest generated answer, in tokens.")

    rules = (
        _not_yet("metrics", "self.metrics.size() == 0", lambda m: not m.metrics,
                 "scoring generated answers", "leave metrics empty"),
    )  # fmt: skip


class MlflowSpec(Model):
    """An MLflow server."""

    uri: Annotated[str, Field(max_length=1024)] = Field(description="URL of the tracking server.")
    experiment: Annotated[str, Field(max_length=256)] = Field(default="", description="Name of the experiment.")


class TrackingSpec(Model):
    """Where the course of training is recorded besides Prometheus."""

    mlflow: MlflowSpec | None = Field(default=None, description="Record to an MLflow server.")

    rules = (_not_yet("mlflow", "!has(self.mlflow)", lambda m: m.mlflow is None, "MLflow", "use Prometheus"),)


class MaxRestartsSpec(Model):
    """How many failures of each cause are survived. A preemption never counts."""

    application: int = Field(default=1, ge=0, le=1000, description="Failures of the training program itself.")
    infrastructure: int = Field(default=20, ge=0, le=1000, description="Failures of nodes, network and storage.")


class RunPolicySpec(Model):
    """Life cycle."""

    suspend: bool = Field(
        default=False, description="true saves a checkpoint and removes the pods; false goes on from there."
    )
    queue_name: Annotated[str, Field(max_length=63)] = Field(
        default="", description="Kueue local queue that admits the pods. Empty means none."
    )
    preflight: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Check model, data and destination in a small pod without GPU before GPUs are taken. auto does so "
        "when GPUs are asked for; without a GPU the same checks run in the training pods.",
    )
    max_restarts: MaxRestartsSpec = Field(
        default_factory=MaxRestartsSpec, description="Restarts of the whole group, by cause."
    )
    active_deadline_seconds: int = Field(
        default=0,
        ge=0,
        le=31536000,
        description="Seconds after which an unfinished job fails. 0 means never.",
    )
    stall_seconds: int = Field(
        default=600, ge=0, le=86400,
        description="Seconds without a sign of progress after which an attempt is ended and restarted. 0 means never.",
    )  # fmt: skip
    ttl_seconds_after_finished: int = Field(
        default=0, ge=0, le=31536000,
        description="Seconds after the end when the pods are removed; the FineTuneJob stays. 0 means never.",
    )  # fmt: skip

    rules = (
        _not_yet(
            "queueName",
            "self.queueName == ''",
            lambda m: m.queue_name == "",
            "a Kueue queue",
            "leave it empty",
        ),
    )


class TolerationSpec(Model):
    """As in a pod."""

    key: s.LabelKey | None = Field(default=None, description="Taint key. Empty means all, with operator Exists.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="Exists or Equal.")
    value: s.LabelValue | None = Field(default=None, description="Taint value, for operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect. Empty means all."
    )
    toleration_seconds: int | None = Field(
        default=None, ge=0, le=31536000, description="For NoExecute: seconds until eviction."
    )

    rules = (
        Rule("operator", "must be Exists when key is empty",
             "has(self.key) || self.operator == 'Exists'",
             lambda m: m.key is not None or m.operator == "Exists"),
        Rule("value", "must be empty when operator is Exists",
             "self.operator != 'Exists' || !has(self.value) || self.value == ''",
             lambda m: m.operator != "Exists" or not m.value),
        Rule("tolerationSeconds", "needs effect NoExecute",
             "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
             lambda m: m.toleration_seconds is None or m.effect == "NoExecute"),
    )  # fmt: skip


_Labels = Annotated[dict[s.LabelKey, s.LabelValue], Field(max_length=32)]
_Annotations = Annotated[dict[s.LabelKey, Annotated[str, Field(max_length=1024)]], Field(max_length=32)]


def _no_reserved_keys(field: str) -> Rule:
    return Rule(
        field=field,
        message="must not use the prefixes finetune-operator.io/, batch.kubernetes.io/ or app.kubernetes.io/",
        cel=f"self.{field}.all(k, " + " && ".join(f"!k.startsWith('{prefix}')" for prefix in _RESERVED) + ")",
        holds=lambda m: not any(key.startswith(_RESERVED) for key in getattr(m, field)),
    )


class PodSpec(Model):
    """Where the pods run and what they carry. Not a free pod template: pods stay restricted."""

    node_selector: _Labels = Field(default_factory=dict, description="Labels that a node must have.")
    tolerations: Annotated[tuple[TolerationSpec, ...], Field(max_length=16)] = Field(
        default=(), description="Taints that the pods accept."
    )
    service_account_name: s.ObjectName = Field(
        default="",
        description="ServiceAccount of the pods, for a cloud's workload identity. Its API token is never mounted. "
        "Empty means default.",
    )
    priority_class_name: s.ObjectName = Field(default="", description="PriorityClass of the pods.")
    labels: _Labels = Field(default_factory=dict, description="Labels added to the pods; ours can't be replaced.")
    annotations: _Annotations = Field(default_factory=dict, description="Annotations added to the pods.")
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = Field(
        default=(), description="Secrets for pulling the trainer image."
    )

    rules = (_no_reserved_keys("labels"), _no_reserved_keys("annotations"))


class Spec(Model):
    """Which model, which data, which method, on how much hardware, where the result goes."""

    model: BaseModelSpec = Field(description="The model that training starts from.")
    dataset: DatasetSpec = Field(description="The examples to learn from.")
    method: MethodSpec = Field(description="What is trained: low-rank adapters, or all weights.")
    training: TrainingSpec = Field(default_factory=TrainingSpec, description="The recipe.")
    distribution: DistributionSpec = Field(
        default_factory=DistributionSpec, description="On how many processes, and what is split between them."
    )
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec, description="What one pod asks for; requests and limits are the same."
    )
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec, description="How often the state is saved.")
    output: OutputSpec = Field(description="Where the result goes.")
    evaluation: EvaluationSpec = Field(
        default_factory=EvaluationSpec, description="What is measured on the test rows besides the loss."
    )
    tracking: TrackingSpec = Field(
        default_factory=TrackingSpec,
        description="Where the course of training is recorded besides Prometheus.",
    )
    run_policy: RunPolicySpec = Field(default_factory=RunPolicySpec, description="Life cycle.")
    pod: PodSpec = Field(default_factory=PodSpec, description="Where the pods run and what they carry.")

    rules = (
        Rule("training.earlyStopping", "needs dataset.validation",
             "!has(self.training.earlyStopping) || has(self.dataset.validation)",
             lambda m: m.training.early_stopping is None or m.dataset.validation is not None),
        Rule("training.globalBatchSize", "must be at least distribution.nodes * distribution.processesPerNode",
             "self.training.globalBatchSize >= self.distribution.nodes * self.distribution.processesPerNode",
             lambda m: m.training.global_batch_size >= m.distribution.nodes * m.distribution.processes_per_node),
        Rule("evaluation.samples", "needs dataset.test",
             "self.evaluation.samples == 0 || has(self.dataset.test)",
             lambda m: m.evaluation.samples == 0 or m.dataset.test is not None),
    )  # fmt: skip


class Metadata(LenientModel):
    """The part of ObjectMeta that we read."""

    name: Annotated[str, Field(max_length=MAX_NAME_LENGTH, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class FineTuneJob(Model):
    """Fine-tunes a language model on several nodes and writes the result to object storage."""

    api_version: Literal["finetune-operator.io/v1alpha1"] = API_VERSION
    kind: Literal["FineTuneJob"] = KIND
    metadata: Metadata
    spec: Spec
    status: Status = Field(default_factory=Status)


def parse(body: Mapping[str, Any]) -> FineTuneJob:
    """A typed job out of a raw body, with defaults applied.

    Raises pydantic.ValidationError (errors.describe puts it into words). JSON rules apply as the API server has them:
    2 is no "2", NaN is no number, a null counts as absent, 2.0 is the integer 2.
    """
    return FineTuneJob.model_validate_json(json.dumps(as_admitted(dict(body), FineTuneJob)), by_name=False)
