"""Defines the FineTuneJob resource, v1alpha1.

The CRD, `kubectl explain` and docs/reference.md are generated from this module and from `spec/`,
which has the sections of spec (`make generate`). Defaults are defined in these models and nowhere
else; the operator never writes spec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import LenientModel, Model, Rule, as_admitted
from finetune_api.names import API_VERSION, KIND, MAX_NAME_LENGTH
from finetune_api.spec.data import ColumnsSpec, DatasetSpec, SourceSpec, TestSpec, ValidationSpec
from finetune_api.spec.environment import EnvVarSpec
from finetune_api.spec.hardware import DistributionSpec, GpuSpec, ResourcesSpec
from finetune_api.spec.inputs import BaseModelSpec, SecretRef
from finetune_api.spec.outcome import (
    CheckpointSpec,
    EvaluationSpec,
    GenerationSpec,
    MaxRestartsSpec,
    OutputSpec,
    RunPolicySpec,
)
from finetune_api.spec.pod import PodSpec, TolerationSpec
from finetune_api.spec.recipe import DpoSpec, EarlyStoppingSpec, FullSpec, LoraSpec, MethodSpec, TrainingSpec
from finetune_api.spec.tracking import MlflowSpec, TrackingSpec, WandbSpec
from finetune_api.spec.volumes import uris_name_volumes
from finetune_api.status import Status

__all__ = [
    "BaseModelSpec",
    "CheckpointSpec",
    "ColumnsSpec",
    "DatasetSpec",
    "DistributionSpec",
    "DpoSpec",
    "EarlyStoppingSpec",
    "EnvVarSpec",
    "EvaluationSpec",
    "FineTuneJob",
    "FullSpec",
    "GenerationSpec",
    "GpuSpec",
    "LoraSpec",
    "MaxRestartsSpec",
    "Metadata",
    "MethodSpec",
    "MlflowSpec",
    "OutputSpec",
    "PodSpec",
    "ResourcesSpec",
    "RunPolicySpec",
    "SecretRef",
    "SourceSpec",
    "Spec",
    "TestSpec",
    "TolerationSpec",
    "TrackingSpec",
    "TrainingSpec",
    "ValidationSpec",
    "WandbSpec",
    "parse",
]


_PART_OF_A_GPU = "^nvidia[.]com/mig-|[.]shared$"


def _not_with_zero3(field: str, cel: str, holds: Callable[[LoraSpec], bool]) -> Rule:
    """Returns the rule for a LoRA option that reads the base's weights outside its layers."""
    return Rule(
        f"method.lora.{field}",
        "can't be combined with distribution.strategy zero3, which shards the weights that it reads; use fsdp or zero2",
        f"self.distribution.strategy != 'zero3' || !has(self.method.lora) || {cel}",
        lambda m: m.distribution.strategy != "zero3" or not m.method.lora or holds(m.method.lora),
    )


class Spec(Model):
    """Specifies the model, the data, the method, the hardware, and the output."""

    model: BaseModelSpec = Field(description="The model that training starts from.")
    dataset: DatasetSpec = Field(description="The training examples.")
    method: MethodSpec = Field(description="What is trained: low-rank adapters, or the weights.")
    training: TrainingSpec = Field(default_factory=TrainingSpec, description="The recipe.")
    distribution: DistributionSpec = Field(
        default_factory=DistributionSpec, description="The number of processes, and what is sharded across them."
    )
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec, description="The resources of one pod; requests and limits are the same."
    )
    checkpoint: CheckpointSpec = Field(
        default_factory=CheckpointSpec, description="How often the training state is saved."
    )
    output: OutputSpec = Field(description="Where the result is written.")
    evaluation: EvaluationSpec = Field(
        default_factory=EvaluationSpec, description="What is measured on the test rows besides the loss."
    )
    tracking: TrackingSpec = Field(
        default_factory=TrackingSpec,
        description="Where the run is recorded besides Prometheus.",
    )
    run_policy: RunPolicySpec = Field(default_factory=RunPolicySpec, description="The life cycle of the job.")
    pod: PodSpec = Field(default_factory=PodSpec, description="Where the pods run, and their labels and annotations.")

    rules = (
        Rule("training.earlyStopping", "needs dataset.validation",
             "!has(self.training.earlyStopping) || has(self.dataset.validation)",
             lambda m: m.training.early_stopping is None or m.dataset.validation is not None),
        Rule("training.globalBatchSize", "must be at least distribution.nodes * distribution.processesPerNode",
             "self.training.globalBatchSize >= self.distribution.nodes * self.distribution.processesPerNode",
             lambda m: m.training.global_batch_size >= m.distribution.nodes * m.distribution.processes_per_node),
        Rule("distribution.processesPerNode",
             "must be 1 with MIG slices or shared GPUs in resources.gpu.name, because a process sees one slice, and "
             "NCCL refuses two processes on one GPU; use more nodes, which are pods and may share a machine",
             "!has(self.resources.gpu) || self.distribution.processesPerNode == 1"
             f" || !self.resources.gpu.name.matches('{_PART_OF_A_GPU}')",
             lambda m: m.resources.gpu is None or m.distribution.processes_per_node == 1
             or not re.search(_PART_OF_A_GPU, m.resources.gpu.name)),
        Rule("training.optimizer", "must be adamw unless distribution.strategy is auto or ddp: the others need "
             "complete matrices, which the other strategies shard",
             "self.training.optimizer == 'adamw' || self.distribution.strategy in ['auto', 'ddp']",
             lambda m: m.training.optimizer == "adamw" or m.distribution.strategy in ("auto", "ddp")),
        Rule("training.gradientMessages", "bfloat16 needs strategy auto or ddp; the others send gradients in float32",
             "self.training.gradientMessages != 'bfloat16' || self.distribution.strategy in ['auto', 'ddp']",
             lambda m: m.training.gradient_messages != "bfloat16" or m.distribution.strategy in ("auto", "ddp")),
        Rule("output.merge", "needs method.type lora; full training writes a complete model anyway",
             "!self.output.merge || self.method.type == 'lora'",
             lambda m: not m.output.merge or m.method.type == "lora"),
        Rule("model.quantization", "needs method.type lora, because a quantized base stays frozen",
             "self.model.quantization == 'none' || self.method.type == 'lora'",
             lambda m: m.model.quantization == "none" or m.method.type == "lora"),
        Rule("distribution.strategy",
             "must be auto or ddp with model.quantization int8, and auto, ddp or fsdp with nf4; no other strategy can "
             "hold such a base",
             "self.model.quantization == 'none' || self.distribution.strategy in ['auto', 'ddp']"
             " || (self.model.quantization == 'nf4' && self.distribution.strategy == 'fsdp')",
             lambda m: m.model.quantization == "none" or m.distribution.strategy in ("auto", "ddp")
             or (m.model.quantization == "nf4" and m.distribution.strategy == "fsdp")),
        Rule("method.lora",
             "dora and addedTokens can't be combined with model.quantization and distribution.strategy fsdp, because "
             "they read weights that only the first process has; use ddp",
             "self.model.quantization == 'none' || self.distribution.strategy != 'fsdp' || !has(self.method.lora)"
             " || (!self.method.lora.dora && self.method.lora.addedTokens.size() == 0)",
             lambda m: m.model.quantization == "none" or m.distribution.strategy != "fsdp" or not m.method.lora
             or not (m.method.lora.dora or m.method.lora.added_tokens)),
        _not_with_zero3("dora", "!self.method.lora.dora", lambda lora: not lora.dora),
        _not_with_zero3("init", "self.method.lora.init == 'default'", lambda lora: lora.init == "default"),
        _not_with_zero3("addedTokens", "self.method.lora.addedTokens.size() == 0", lambda lora: not lora.added_tokens),
        Rule("distribution.sequenceParallelSize", "above 1 needs dataset.packing, because only packed rows are shared",
             "self.distribution.sequenceParallelSize == 1 || self.dataset.packing",
             lambda m: m.distribution.sequence_parallel_size == 1 or m.dataset.packing),
        Rule("output.merge", "needs model.quantization none, because the adapter was trained on the quantized weights",
             "!self.output.merge || self.model.quantization == 'none'",
             lambda m: not m.output.merge or m.model.quantization == "none"),
        Rule("output.merge", "merging method.lora.addedTokens is not supported yet; load the adapter with PEFT",
             "!self.output.merge || !has(self.method.lora) || self.method.lora.addedTokens.size() == 0",
             lambda m: not m.output.merge or not m.method.lora or not m.method.lora.added_tokens),
        Rule("method.lora.bias",
             "must be none with model.quantization, because bitsandbytes computes biases in lower precision",
             "self.model.quantization == 'none' || !has(self.method.lora) || self.method.lora.bias == 'none'",
             lambda m: m.model.quantization == "none" or not m.method.lora or m.method.lora.bias == "none"),
        Rule("method.lora.init", "pissa and olora need model.quantization none, because they change the base",
             "self.model.quantization == 'none' || !has(self.method.lora) || self.method.lora.init == 'default'",
             lambda m: m.model.quantization == "none" or not m.method.lora or m.method.lora.init == "default"),
        Rule("model.checkpoint.uri", "is this job's own output, from which it resumes by itself; remove it, or name "
             "another job's output",
             "!has(self.model.checkpoint) || !(self.model.checkpoint.uri in [self.output.uri, self.output.uri + '/']"
             " || self.model.checkpoint.uri + '/' == self.output.uri)",
             lambda m: m.model.checkpoint is None
             or m.model.checkpoint.uri.removesuffix("/") != m.output.uri.removesuffix("/")),
        Rule("model.checkpoint.use", "can't be weights with method.lora.init pissa or olora, which change the base "
             "that these weights belong to; use init default",
             "!has(self.model.checkpoint) || self.model.checkpoint.use != 'weights' || !has(self.method.lora)"
             " || self.method.lora.init == 'default'",
             lambda m: m.model.checkpoint is None or m.model.checkpoint.use != "weights" or not m.method.lora
             or m.method.lora.init == "default"),
        Rule("evaluation.samples", "needs dataset.test",
             "self.evaluation.samples == 0 || has(self.dataset.test)",
             lambda m: m.evaluation.samples == 0 or m.dataset.test is not None),
        Rule("pod.topology", "has no meaning with one pod; remove it, or raise distribution.nodes",
             "!has(self.pod.topology) || self.distribution.nodes > 1",
             lambda m: m.pod.topology is None or m.distribution.nodes > 1),
        Rule("evaluation.metrics", "needs dataset.test",
             "self.evaluation.metrics.size() == 0 || has(self.dataset.test)",
             lambda m: not m.evaluation.metrics or m.dataset.test is not None),
        *uris_name_volumes(),
    )  # fmt: skip


class Metadata(LenientModel):
    """Contains the fields of ObjectMeta that are used."""

    name: Annotated[str, Field(max_length=MAX_NAME_LENGTH, pattern=s.NAME_PATTERN)]
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
    """Parses a raw body into a typed job, with defaults applied.

    Raises pydantic.ValidationError (errors.describe turns it into sentences). The API server's
    rules for JSON apply: 2 isn't "2", NaN isn't a number, a null counts as absent, and 2.0 is the
    integer 2.
    """
    return FineTuneJob.model_validate_json(json.dumps(as_admitted(dict(body), FineTuneJob)), by_name=False)
