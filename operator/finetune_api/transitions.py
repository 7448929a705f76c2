"""Which fields of a FineTuneJob may change after creation. `schema` writes the same as CEL transition rules, so that
they hold in the API server; this is their pydantic side, for the command line and for tests. Pure.
"""

from __future__ import annotations

from finetune_api import resource as r
from finetune_api.model import Model

# The sections of spec, by model: all of their fields are fixed, but for those in MUTABLE.
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


def is_immutable(section: str, field: str) -> bool:
    """Whether `spec.<section>.<field>` keeps its first value for ever."""
    return (section, field) not in MUTABLE


def immutable_message(section: str, field: str) -> str:
    return f"spec.{section}.{field} is immutable; create a FineTuneJob with another name"


def transition_errors(old: r.Spec, new: r.Spec) -> tuple[str, ...]:
    """Why the API server would refuse to turn `old` into `new`; empty if it would not."""
    errors = []
    for name, spec_field in r.Spec.model_fields.items():
        section = spec_field.alias or name
        before, after = getattr(old, name), getattr(new, name)
        errors += [
            immutable_message(section, field.alias or attribute)
            for attribute, field in type(before).model_fields.items()
            if is_immutable(section, field.alias or attribute)
            and getattr(before, attribute) != getattr(after, attribute)
        ]
    if new.run_policy.queue_name != old.run_policy.queue_name and not old.run_policy.suspend:
        errors.append("spec.runPolicy.queueName can be changed only while spec.runPolicy.suspend is true")
    return tuple(errors)
