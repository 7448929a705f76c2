"""Defines which fields of a FineTuneJob may change after creation.

`schema` turns this into CEL transition rules, which the API server enforces. It does no I/O.
"""

from __future__ import annotations

from finetune_api import resource as r
from finetune_api.base import Model

# The sections of spec, by model: all of their fields are immutable, except for those in MUTABLE.
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

MUTABLE = {
    ("runPolicy", "suspend"),
    ("runPolicy", "queueName"),  # while suspended
    ("runPolicy", "activeDeadlineSeconds"),
    ("runPolicy", "ttlSecondsAfterFinished"),
}

QUEUE_NAME_MESSAGE = "spec.runPolicy.queueName can only be changed while spec.runPolicy.suspend is true"


def is_immutable(section: str, field: str) -> bool:
    """Whether `spec.<section>.<field>` can't be changed after creation."""
    return (section, field) not in MUTABLE


def immutable_message(section: str, field: str) -> str:
    """Returns the message for a change of an immutable field."""
    return f"spec.{section}.{field} is immutable; create a new FineTuneJob instead"
