"""Writes the CEL rules by which the API server refuses a change of a FineTuneJob.

It returns plain values and does no I/O.
"""

from __future__ import annotations

from typing import Any

from finetune_api.base import Model
from finetune_api.crd.literals import cel_string
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


def field_rule(model: type[Model], key: str) -> list[_JsonSchema]:
    """Returns the rule at a field of a section of spec that can't change, or only in one way; empty
    if there is none.

    Each write of status evaluates all rules of the resource, and the API server's access to a field
    of an object is as expensive as the object has fields. A rule at the field itself needs none.
    """
    section = IMMUTABLE.get(model)
    if section is not None and is_immutable(section, key):
        return [{"rule": "self == oldSelf", "message": immutable_message(section, key)}]
    if (section, key) == ("runPolicy", "retry"):
        return [{"rule": "self >= oldSelf", "message": RETRY_MESSAGE}]
    return []


def section_rules(model: type[Model]) -> list[_JsonSchema]:
    """Returns the rules of a section of spec that no rule at a field can express: a field that may
    be absent can't be added or removed."""
    section = IMMUTABLE.get(model)
    if section is None:
        return []
    rules = [
        _rule(f"has(self.{key}) == has(oldSelf.{key})", immutable_message(section, key), key)
        for key, field in ((field.alias or name, field) for name, field in model.model_fields.items())
        if is_immutable(section, key) and is_optional(field)
    ]
    if section == "runPolicy":
        rules.append(_rule("self.queueName == oldSelf.queueName || oldSelf.suspend", QUEUE_NAME_MESSAGE, "queueName"))
    if section == "resources":
        rules.append(_rule("has(self.gpu) == has(oldSelf.gpu)", GPU_MESSAGE, "gpu"))
    return rules


def stopped_rules() -> list[_JsonSchema]:
    """Returns a rule for each section with fields that can change only while no pods run; its
    message is that of the first field that has changed."""
    rules = []
    for model, section in IMMUTABLE.items():
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        checks = {
            key: cel_equal(section, key, "new", "old", optional=is_optional(field))
            for key, field in fields.items()
            if (section, key) in WHILE_STOPPED
        }
        if checks:
            rules.append(
                {
                    "rule": f"{_of_both(section, ' && '.join(checks.values()))} || {_IS_STOPPED}",
                    "messageExpression": _first_message(section, checks),
                    "fieldPath": f".spec.{section}",
                }
            )
    return rules


def _of_both(section: str, condition: str) -> str:
    """Returns the condition on a section of both specs, each of which is looked up once."""
    inner = f"optional.of(oldSelf.spec.{section}).optMap(old, {condition}).value()"
    return f"optional.of(self.spec.{section}).optMap(new, {inner}).value()"


def _first_message(section: str, checks: dict[str, str]) -> str:
    *others, last = checks
    message = cel_string(stopped_message(section, last))
    for key in reversed(others):
        message = f"!{_of_both(section, checks[key])} ? {cel_string(stopped_message(section, key))} : ({message})"
    return message


def _rule(expression: str, message: str, path: str) -> _JsonSchema:
    return {"rule": expression, "message": message, "fieldPath": f".{path}"}
