"""The FineTuneJob resource, v1alpha1: what a user writes. The CRD, `kubectl explain` and docs/reference.md are
generated from here and the spec_* modules (`make generate`), which hold the sections of spec. Defaults live in these
models and nowhere else; the operator never writes spec.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.model import LenientModel, Model, Rule, as_admitted
from finetune_api.names import API_VERSION, KIND, MAX_NAME_LENGTH
from finetune_api.spec_data import ColumnsSpec, DatasetSpec, SourceSpec, TestSpec, ValidationSpec
from finetune_api.spec_hardware import DistributionSpec, GpuSpec, PodSpec, ResourcesSpec, TolerationSpec
from finetune_api.spec_inputs import BaseModelSpec, SecretRef
from finetune_api.spec_outcome import (
    CheckpointSpec,
    EvaluationSpec,
    GenerationSpec,
    MaxRestartsSpec,
    OutputSpec,
    RunPolicySpec,
)
from finetune_api.spec_recipe import DpoSpec, EarlyStoppingSpec, FullSpec, LoraSpec, MethodSpec, TrainingSpec
from finetune_api.spec_tracking import MlflowSpec, TrackingSpec, WandbSpec
from finetune_api.status import Status

__all__ = [
    "BaseModelSpec",
    "CheckpointSpec",
    "ColumnsSpec",
    "DatasetSpec",
    "DistributionSpec",
    "DpoSpec",
    "EarlyStoppingSpec",
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


def _not_split(field: str, cel: str, holds: Callable[[LoraSpec], bool]) -> Rule:
    """For what reads the base's weights outside of their layers."""
    return Rule(
        f"method.lora.{field}",
        "can't be had with distribution.strategy zero3, which splits what it reads; use fsdp or zero2",
        f"self.distribution.strategy != 'zero3' || !has(self.method.lora) || {cel}",
        lambda m: m.distribution.strategy != "zero3" or not m.method.lora or holds(m.method.lora),
    )


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
        Rule("training.optimizer", "all but adamw need distribution.strategy auto or ddp: they compute with whole "
             "matrices, which the other strategies cut; use one of these, or adamw",
             "self.training.optimizer == 'adamw' || self.distribution.strategy in ['auto', 'ddp']",
             lambda m: m.training.optimizer == "adamw" or m.distribution.strategy in ("auto", "ddp")),
        Rule("output.merge", "needs method.type lora; what full training writes is a whole model already",
             "!self.output.merge || self.method.type == 'lora'",
             lambda m: not m.output.merge or m.method.type == "lora"),
        Rule("model.quantization", "needs method lora: a quantised base stays frozen",
             "self.model.quantization == 'none' || self.method.type == 'lora'",
             lambda m: m.model.quantization == "none" or m.method.type == "lora"),
        Rule("distribution.strategy", "must be auto or ddp with model.quantization: only they carry a quantised base",
             "self.model.quantization == 'none' || self.distribution.strategy in ['auto', 'ddp']",
             lambda m: m.model.quantization == "none" or m.distribution.strategy in ("auto", "ddp")),
        _not_split("dora", "!self.method.lora.dora", lambda lora: not lora.dora),
        _not_split("init", "self.method.lora.init == 'default'", lambda lora: lora.init == "default"),
        _not_split("addedTokens", "self.method.lora.addedTokens.size() == 0", lambda lora: not lora.added_tokens),
        Rule("output.merge", "needs model.quantization none: whole weights and adapter aren't what was trained",
             "!self.output.merge || self.model.quantization == 'none'",
             lambda m: not m.output.merge or m.model.quantization == "none"),
        Rule("output.merge", "is not supported yet with method.lora.addedTokens; load the adapter with PEFT",
             "!self.output.merge || !has(self.method.lora) || self.method.lora.addedTokens.size() == 0",
             lambda m: not m.output.merge or not m.method.lora or not m.method.lora.added_tokens),
        Rule("method.lora.bias", "must be none with model.quantization: bitsandbytes narrows biases as it computes",
             "self.model.quantization == 'none' || !has(self.method.lora) || self.method.lora.bias == 'none'",
             lambda m: m.model.quantization == "none" or not m.method.lora or m.method.lora.bias == "none"),
        Rule("method.lora.init", "pissa and olora need model.quantization none: they change the base",
             "self.model.quantization == 'none' || !has(self.method.lora) || self.method.lora.init == 'default'",
             lambda m: m.model.quantization == "none" or not m.method.lora or m.method.lora.init == "default"),
        Rule("evaluation.samples", "needs dataset.test",
             "self.evaluation.samples == 0 || has(self.dataset.test)",
             lambda m: m.evaluation.samples == 0 or m.dataset.test is not None),
        Rule("evaluation.metrics", "needs dataset.test",
             "self.evaluation.metrics.size() == 0 || has(self.dataset.test)",
             lambda m: not m.evaluation.metrics or m.dataset.test is not None),
    )  # fmt: skip


class Metadata(LenientModel):
    """The part of ObjectMeta that we read."""

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
    """A typed job out of a raw body, with defaults applied.

    Raises pydantic.ValidationError (errors.describe puts it into words). JSON rules apply as the API server has them:
    2 is no "2", NaN is no number, a null counts as absent, 2.0 is the integer 2.
    """
    return FineTuneJob.model_validate_json(json.dumps(as_admitted(dict(body), FineTuneJob)), by_name=False)
