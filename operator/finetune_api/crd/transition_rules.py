"""Writes the CEL rules by which the API server refuses a change of a FineTuneJob.

It returns plain values and does no I/O.
"""

from __future__ import annotations

from typing import Any

from finetune_api.base import Model
from finetune_api.crd.transitions import (
    GPU_MESSAGE,
    IMMUTABLE,
    QUEUE_NAME_MESSAGE,
    RETRY_MESSAGE,
    STOPPED_PHASES,
    WHILE_STOPPED,
    cel_equal,
    immutable_message,
    is_immutable,
    is_optional,
    stopped_message,
)

_JsonSchema = dict[str, Any]

# The pods are stopped, or will be before the next ones start. A rule about status has to stand at
# the root of the resource.
_IS_STOPPED = (
    "self.spec.runPolicy.suspend || !has(oldSelf.status) || !has(oldSelf.status.phase)"
    f" || oldSelf.status.phase in [{', '.join(repr(phase) for phase in STOPPED_PHASES)}]"
)


def immutability_rules(model: type[Model]) -> list[_JsonSchema]:
    """Returns a rule for each field of a section of spec that can't change, or only in one way."""
    section = IMMUTABLE.get(model)
    if section is None:
        return []
    rules = [
        _rule(
            cel_equal(section, key, "self", "oldSelf", optional=is_optional(field)),
            immutable_message(section, key),
            key,
        )
        for key, field in ((field.alias or name, field) for name, field in model.model_fields.items())
        if is_immutable(section, key)
    ]
    if section == "runPolicy":
        rules.append(_rule("self.queueName == oldSelf.queueName || oldSelf.suspend", QUEUE_NAME_MESSAGE, "queueName"))
        rules.append(_rule("self.retry >= oldSelf.retry", RETRY_MESSAGE, "retry"))
    if section == "resources":
        rules.append(_rule("has(self.gpu) == has(oldSelf.gpu)", GPU_MESSAGE, "gpu"))
    return rules


def stopped_rules() -> list[_JsonSchema]:
    """Returns a rule for each field that can change only while no pods run."""
    rules = []
    for model, section in IMMUTABLE.items():
        for name, field in model.model_fields.items():
            key = field.alias or name
            if (section, key) in WHILE_STOPPED:
                sides = f"self.spec.{section}", f"oldSelf.spec.{section}"
                equal = cel_equal(section, key, *sides, optional=is_optional(field))
                message = stopped_message(section, key)
                rules.append(_rule(f"{equal} || {_IS_STOPPED}", message, f"spec.{section}.{key}"))
    return rules


def _rule(expression: str, message: str, path: str) -> _JsonSchema:
    return {"rule": expression, "message": message, "fieldPath": f".{path}"}
