"""Defines spec.pod: where the pods run, and their labels, annotations and variables."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule
from finetune_api.spec.environment import EnvVarSpec, unique_names
from finetune_api.spec.inputs import SecretRef

_RESERVED = ("finetune-operator.io/", "batch.kubernetes.io/", "app.kubernetes.io/")


class TolerationSpec(Model):
    """Specifies a toleration, as in a pod's spec."""

    key: s.LabelKey | None = Field(default=None, description="Taint key. Empty means every key, with operator Exists.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="Exists or Equal.")
    value: s.LabelValue | None = Field(default=None, description="Taint value, for operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect. Empty means every effect."
    )
    toleration_seconds: int | None = Field(
        default=None,
        ge=0,
        le=31536000,
        description="For NoExecute: seconds until the pod is evicted. Empty means never.",
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
    """Returns the rule that labels or annotations don't use a prefix of the operator's own."""
    return Rule(
        field=field,
        message="must not use the prefixes finetune-operator.io/, batch.kubernetes.io/ or app.kubernetes.io/",
        cel=f"self.{field}.all(k, " + " && ".join(f"!k.startsWith('{prefix}')" for prefix in _RESERVED) + ")",
        holds=lambda m: not any(key.startswith(_RESERVED) for key in getattr(m, field)),
    )


class PodSpec(Model):
    """Specifies where the pods run, and their labels and annotations. It isn't a free-form pod
    template: the pods stay restricted."""

    node_selector: _Labels = Field(default_factory=dict, description="Labels that a node must have.")
    tolerations: Annotated[tuple[TolerationSpec, ...], Field(max_length=16)] = Field(
        default=(), description="Taints that the pods tolerate."
    )
    service_account_name: s.ObjectName = Field(
        default="",
        description="ServiceAccount of the pods, for a cloud's workload identity. Its API token is never mounted. "
        "Empty means the namespace's default ServiceAccount.",
    )
    scheduler_name: s.ObjectName = Field(
        default="", description="Scheduler of the training pods. Empty means the chart's pods.schedulerName."
    )
    priority_class_name: s.ObjectName = Field(default="", description="PriorityClass of the pods.")
    labels: _Labels = Field(
        default_factory=dict, description="Labels added to the pods; those of the operator can't be replaced."
    )
    annotations: _Annotations = Field(default_factory=dict, description="Annotations added to the pods.")
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = Field(
        default=(), description="Secrets for pulling the trainer image."
    )
    env: Annotated[tuple[EnvVarSpec, ...], Field(max_length=32)] = Field(
        default=(),
        description="Environment variables of the pods, for NCCL, RDMA libraries, PyTorch and proxies. They replace "
        "those of the chart's pods.env that have the same name.",
    )

    termination_grace_period_seconds: int | None = Field(
        default=None,
        ge=15,
        le=3600,
        description="Seconds from SIGTERM to SIGKILL, in which a pod saves and uploads a checkpoint. Empty means the "
        "chart's pods.gracePeriodSeconds.",
    )

    rules = (_no_reserved_keys("labels"), _no_reserved_keys("annotations"), unique_names("env"))
