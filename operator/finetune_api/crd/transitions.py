"""Defines which fields of a FineTuneJob may change after creation, and when.

`schema` turns this into CEL transition rules, which the API server enforces. It does no I/O.
"""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from finetune_api import resource as r
from finetune_api.base import Model
from finetune_api.scalars import quantity_value

# The sections of spec, by model: all of their fields are immutable, except for
# those in MUTABLE and WHILE_STOPPED.
IMMUTABLE: dict[type[Model], str] = {
    r.BaseModelSpec: "model",
    r.DatasetSpec: "dataset",
    r.MethodSpec: "method",
    r.TrainingSpec: "training",
    r.DistributionSpec: "distribution",
    r.ResourcesSpec: "resources",
    r.CheckpointSpec: "checkpoint",
    r.OutputSpec: "output",
    r.EvaluationSpec: "evaluation",
    r.TrackingSpec: "tracking",
    r.RunPolicySpec: "runPolicy",
    r.PodSpec: "pod",
}

# Fields that may change at any time.
MUTABLE = {
    ("runPolicy", "suspend"),
    ("runPolicy", "queueName"),  # while suspended
    ("runPolicy", "retry"),  # it can only be raised
    ("runPolicy", "maxRestarts"),
    ("runPolicy", "schedulingTimeoutSeconds"),
    ("runPolicy", "activeDeadlineSeconds"),
    ("runPolicy", "ttlSecondsAfterFinished"),
    ("output", "deletionPolicy"),
}

# Fields that may change while no pods run, because they don't change what is computed: where and
# how it is computed, and by whose rights. A checkpoint suits any number of processes and any
# strategy.
WHILE_STOPPED = {
    ("model", "credentialsRef"),
    ("model", "allowedLicenses"),
    ("dataset", "credentialsRef"),
    ("output", "credentialsRef"),
    ("output", "existing"),
    ("output", "holdSeconds"),
    ("training", "microBatchSize"),
    ("training", "activationCheckpointing"),
    ("training", "compile"),
    ("runPolicy", "preflight"),
    ("runPolicy", "preflightSeconds"),
    ("runPolicy", "stallSeconds"),
    *((section, field) for section, model in (
        ("distribution", r.DistributionSpec),
        ("resources", r.ResourcesSpec),
        ("checkpoint", r.CheckpointSpec),
        ("tracking", r.TrackingSpec),
        ("pod", r.PodSpec),
    ) for field in (field.alias or name for name, field in model.model_fields.items())
      if field != "volumes"),  # a URI could name other rows
}  # fmt: skip

QUANTITIES = {("resources", field) for field in ("cpu", "memory", "sharedMemory", "scratch")}
"""Fields whose values are equal if their amounts are: 300m is 0.3."""

STOPPED_PHASES = ("Pending", "Queued", "Restarting", "Suspended", "Failed")

_MAP_OF_QUANTITIES = ("resources", "extra")

QUEUE_NAME_MESSAGE = "spec.runPolicy.queueName can only be changed while spec.runPolicy.suspend is true"
RETRY_MESSAGE = "spec.runPolicy.retry can only be raised"
GPU_MESSAGE = "spec.resources.gpu can't be added or removed, only its name changed; create a new FineTuneJob instead"


def is_immutable(section: str, field: str) -> bool:
    """Whether `spec.<section>.<field>` can't be changed after creation."""
    return (section, field) not in MUTABLE and (section, field) not in WHILE_STOPPED


def immutable_message(section: str, field: str) -> str:
    """Returns the message for a change of an immutable field."""
    return f"spec.{section}.{field} is immutable; create a new FineTuneJob instead"


def stopped_message(section: str, field: str) -> str:
    """Returns the message for a change that has to wait until no pods run."""
    return (
        f"spec.{section}.{field} can't be changed while pods run; set spec.runPolicy.suspend to true in the same "
        "change, and to false afterwards: the job resumes from its checkpoint"
    )


def is_equal(section: str, field: str, before: Any, after: Any) -> bool:
    """Whether two values of a field mean the same."""
    if (section, field) in QUANTITIES and "auto" not in (before, after):
        return quantity_value(before) == quantity_value(after)
    if (section, field) == _MAP_OF_QUANTITIES:
        return before.keys() == after.keys() and all(
            quantity_value(before[k]) == quantity_value(after[k]) for k in after
        )
    return bool(before == after)


def cel_equal(section: str, field: str, new: str, old: str, *, optional: bool) -> str:
    """Returns the CEL expression for `is_equal` of a field of the objects `new` and `old`."""
    same = f"{new}.{field} == {old}.{field}"
    if (section, field) == _MAP_OF_QUANTITIES:
        same = f"quantity(string({new}.{field}[k])).compareTo(quantity(string({old}.{field}[k]))) == 0"
        return f"({new}.{field}.size() == {old}.{field}.size() && {new}.{field}.all(k, k in {old}.{field} && {same}))"
    if (section, field) in QUANTITIES:
        values = [f"string({side}.{field})" for side in (new, old)]
        amounts = f"quantity({values[0]}).compareTo(quantity({values[1]})) == 0"
        return f"({same} || ({values[0]} != 'auto' && {values[1]} != 'auto' && {amounts}))"
    return f"(has({new}.{field}) ? has({old}.{field}) && {same} : !has({old}.{field}))" if optional else f"({same})"


def is_optional(field: FieldInfo) -> bool:
    """Whether a field may be absent, even after defaulting."""
    return not field.is_required() and field.get_default(call_default_factory=True) is None
