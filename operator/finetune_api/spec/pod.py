"""Defines spec.pod: where the pods run, and their labels, annotations and variables."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule
from finetune_api.spec.environment import EnvVarSpec, unique_names
from finetune_api.spec.inputs import SecretRef
from finetune_api.spec.volumes import Volumes, unique_volumes

_RESERVED = ("finetune-operator.io/", "batch.kubernetes.io/", "app.kubernetes.io/")
_RESERVED_KEYS = ("job-name", "controller-uid")  # of the Job controller, from before it had a prefix


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
    """Returns the rule that labels or annotations don't use keys of the operator's own, or those
    of the Job controller."""
    prefixes = " && ".join(f"!k.startsWith('{prefix}')" for prefix in _RESERVED)
    return Rule(
        field=field,
        message="must not use the prefixes finetune-operator.io/, batch.kubernetes.io/ or app.kubernetes.io/, nor the "
        "keys job-name and controller-uid, which belong to the Job controller",
        cel=f"self.{field}.all(k, {prefixes} && !(k in {list(_RESERVED_KEYS)}))",
        holds=lambda m: not any(key.startswith(_RESERVED) or key in _RESERVED_KEYS for key in getattr(m, field)),
    )


_NodeValues = Annotated[tuple[s.LabelValue, ...], Field(max_length=16)]
_NodeOperator = Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
_VALUES = "the label's values, for In and NotIn; one whole number, for Gt and Lt"


def _node_rules() -> tuple[Rule, ...]:
    """Returns the rules that a requirement has the values that its operator needs."""
    return (
        Rule("values", "must not be empty with operator In or NotIn",
             "!(self.operator in ['In', 'NotIn']) || self.values.size() > 0",
             lambda m: m.operator not in ("In", "NotIn") or len(m.values) > 0),
        Rule("values", "must be empty with operator Exists or DoesNotExist",
             "!(self.operator in ['Exists', 'DoesNotExist']) || self.values.size() == 0",
             lambda m: m.operator not in ("Exists", "DoesNotExist") or not m.values),
        Rule("values", "must be one whole number with operator Gt or Lt",
             "!(self.operator in ['Gt', 'Lt']) || (self.values.size() == 1 && self.values[0].matches('^[0-9]+$'))",
             lambda m: m.operator not in ("Gt", "Lt")
             or (len(m.values) == 1 and re.fullmatch("[0-9]+", m.values[0]) is not None)),
    )  # fmt: skip


class NodeRequirementSpec(Model):
    """Specifies a condition on a node's label."""

    key: s.RequiredLabelKey = Field(description="Label of the node.")
    operator: _NodeOperator = Field(description="In, NotIn, Exists, DoesNotExist, Gt or Lt, as in Kubernetes.")
    values: _NodeValues = Field(default=(), description=f"{_VALUES[0].upper()}{_VALUES[1:]}.")

    rules = _node_rules()


class NodePreferenceSpec(Model):
    """Specifies a condition on a node's label that the scheduler prefers to be true."""

    key: s.RequiredLabelKey = Field(description="Label of the node.")
    operator: _NodeOperator = Field(description="In, NotIn, Exists, DoesNotExist, Gt or Lt, as in Kubernetes.")
    values: _NodeValues = Field(default=(), description=f"{_VALUES[0].upper()}{_VALUES[1:]}.")
    weight: int = Field(default=50, ge=1, le=100, description="Importance, compared with other preferences.")

    rules = _node_rules()


class NodeAffinitySpec(Model):
    """Specifies nodes by conditions that nodeSelector can't express: not being spot nodes, say."""

    required: Annotated[tuple[NodeRequirementSpec, ...], Field(max_length=16)] = Field(
        default=(), description="Conditions that a node must meet, all of them."
    )
    preferred: Annotated[tuple[NodePreferenceSpec, ...], Field(max_length=16)] = Field(
        default=(), description="Conditions that a node should meet."
    )


class TopologySpec(Model):
    """Specifies a part of the cluster for all pods of a group: a block, a rack or a zone."""

    key: s.RequiredLabelKey = Field(
        description="Label whose value names the part of the cluster that a node belongs to, such as "
        "topology.kubernetes.io/zone or a label of your provider for a block or a rack."
    )
    policy: Literal["required", "preferred", "spread"] = Field(
        default="preferred",
        description="required runs all pods of an attempt in one part; preferred does so if possible; spread "
        "distributes them over the parts if possible. With runPolicy.queueName, Kueue chooses the part for the first "
        "two.",
    )


class PodSpec(Model):
    """Specifies where the pods run, and their labels and annotations. It isn't a free-form pod
    template: the pods stay restricted."""

    image: s.ImageName = Field(
        default="",
        description="Trainer image of this job, if the administrator allows it (the chart's pods.allowedImages). "
        "It must come from the same build as the operator. Empty means the chart's trainer.image.",
    )
    network: s.ObjectName = Field(
        default="",
        description="Name of a network profile that the administrator has defined in the chart's "
        "pods.networkProfiles, such as infiniband. It adds devices, variables and annotations to the training pods. "
        "Empty means the pod network only.",
    )
    topology: TopologySpec | None = Field(
        default=None, description="Part of the cluster that the pods share. Empty means any nodes."
    )
    node_affinity: NodeAffinitySpec = Field(
        default_factory=NodeAffinitySpec, description="Conditions on the nodes of the training pods."
    )
    one_pod_per_node: Literal["auto", "required", "preferred"] = Field(
        default="auto",
        description="Whether two pods of an attempt may share a node, between which NCCL uses the network. auto is "
        "required if a pod requests all GPUs of a node (the chart's pods.gpusPerNode), else preferred.",
    )
    node_selector: _Labels = Field(
        default_factory=dict,
        description="Labels that a node must have, if the administrator allows their keys (tenants.nodeLabelKeys). "
        "Those of the chart's pods.nodeSelector apply as well, and win.",
    )
    tolerations: Annotated[tuple[TolerationSpec, ...], Field(max_length=16)] = Field(
        default=(),
        description="Taints that the pods tolerate, if the administrator allows their keys (tenants.tolerationKeys).",
    )
    service_account_name: s.ObjectName = Field(
        default="",
        description="ServiceAccount of the pods, for a cloud's workload identity. Its API token is never mounted. "
        "Empty means the namespace's default ServiceAccount. Another one needs the label finetune-operator.io/use: "
        "training, or a place in the chart's tenants.serviceAccounts.",
    )
    scheduler_name: s.ObjectName = Field(
        default="", description="Scheduler of the training pods. Empty means the chart's pods.schedulerName."
    )
    priority_class_name: s.ObjectName = Field(
        default="", description="PriorityClass of the pods, if the administrator allows it (tenants.priorityClasses)."
    )
    labels: _Labels = Field(
        default_factory=dict, description="Labels added to the pods; those of the operator can't be replaced."
    )
    annotations: _Annotations = Field(
        default_factory=dict,
        description="Annotations added to the pods, if the administrator allows their keys (tenants.annotationKeys).",
    )
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = Field(
        default=(), description="Secrets for pulling the trainer image."
    )
    env: Annotated[tuple[EnvVarSpec, ...], Field(max_length=32)] = Field(
        default=(),
        description="Environment variables of the pods, for NCCL, RDMA libraries, PyTorch and proxies. They replace "
        "those of the chart's pods.env that have the same name.",
    )
    volumes: Volumes = Field(
        default=(),
        description="Volumes of the training pods, which volume:// URIs name: a claim, an ephemeral volume of a CSI "
        "driver, or the files of an image.",
    )
    termination_grace_period_seconds: int | None = Field(
        default=None,
        ge=15,
        le=3600,
        description="Seconds from SIGTERM to SIGKILL, in which a pod saves and uploads a checkpoint. Empty means the "
        "chart's pods.gracePeriodSeconds.",
    )

    rules = (_no_reserved_keys("labels"), _no_reserved_keys("annotations"), unique_names("env"), unique_volumes())
