"""spec.distribution, spec.resources and spec.pod: on what, and where, it runs. Put together in `resource`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.model import Model, Rule
from finetune_api.spec_inputs import SecretRef

_RESERVED = ("finetune-operator.io/", "batch.kubernetes.io/", "app.kubernetes.io/")


class DistributionSpec(Model):
    """On how many processes, and what is split between them."""

    nodes: int = Field(default=1, ge=1, le=1024, description="Pods, one a node.")
    processes_per_node: int = Field(
        default=1, ge=1, le=16, description="Processes in a pod, one a GPU. As many GPUs are asked for."
    )
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"] = Field(
        default="auto",
        description="ddp copies everything to each process; zero1 splits optimizer state, zero2 gradients too, zero3 "
        "weights too (DeepSpeed); fsdp splits all of it as well (PyTorch's FSDP2). auto takes "
        "the fastest that fits, by an estimate that the log shows.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="What rests in the host's memory instead of the GPU's: optimizer state (zero2, zero3), or the "
        "weights too (zero3, fsdp). Slower; it never changes the result. With strategy auto it is the least: more is "
        "moved where memory asks for it.",
    )

    rules = (
        Rule("offload", "of optimizer state needs strategy auto, zero2 or zero3",
             "self.offload != 'optimizer' || self.strategy in ['auto', 'zero2', 'zero3']",
             lambda m: m.offload != "optimizer" or m.strategy in ("auto", "zero2", "zero3")),
        Rule("offload", "of parameters needs strategy auto, zero3 or fsdp",
             "self.offload != 'parameters' || self.strategy in ['auto', 'zero3', 'fsdp']",
             lambda m: m.offload != "parameters" or m.strategy in ("auto", "zero3", "fsdp")),
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
