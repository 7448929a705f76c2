"""Builds the CustomResourceDefinition of FineTuneJob from the pydantic models.

Its structural OpenAPI v3 schema has defaults and CEL rules. The module returns plain values and
does no I/O.
"""

from __future__ import annotations

from typing import Any

from finetune_api.base import Model, Rule, model_in
from finetune_api.crd.literals import cel_string
from finetune_api.crd.transition_rules import field_rule, section_rules, stopped_rules
from finetune_api.names import GROUP, KIND, MAX_NAME_LENGTH, PLURAL, SHORT_NAME, SINGULAR, VERSION
from finetune_api.resource import FineTuneJob, Spec
from finetune_api.scalars import NAME_PATTERN
from finetune_api.status import Condition, Status

JsonSchema = dict[str, Any]

NAME_MESSAGE = f"must be at most {MAX_NAME_LENGTH} lowercase letters, digits and dashes, starting with a letter"

# What a job's status is until the operator has written one. Without it, tools that follow kstatus
# would take a job without conditions for one that is ready.
_FIRST_STATUS: JsonSchema = {"observedGeneration": 0, "phase": "Pending"}

# jsonPath, type, name, description, priority (1 is shown by -o wide)
_COLUMNS = (
    (".status.phase", "string", "Phase", "Summary of the conditions.", 0),
    (".status.reason", "string", "Reason", "Why it waits, was last restarted, or failed.", 0),
    (".status.progress.step", "integer", "Step", "Finished optimizer steps.", 0),
    (".status.progress.percent", "integer", "%", "Finished share of the steps.", 0),
    (".status.progress.trainLoss", "number", "Loss", "Training loss of the last step.", 0),
    (".status.progress.eta", "string", "ETA", "Estimated time of training left.", 0),
    (".status.gpus", "integer", "GPUs", "Total number of GPUs.", 0),
    (".status.restartsTotal", "integer", "Restarts", "Restarts of the whole group.", 0),
    (".metadata.creationTimestamp", "date", "Age", "", 0),
    (".status.message", "string", "Message", "What the job is waiting for, or how it ended.", 1),
)


def custom_resource_definition() -> dict[str, Any]:
    """Returns the apiextensions.k8s.io/v1 object, ready to be written as YAML."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            "labels": {"app.kubernetes.io/part-of": "finetune-operator"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["ml"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*column) for column in _COLUMNS],
                    "schema": {"openAPIV3Schema": root_schema()},
                }
            ],
        },
    }


def root_schema() -> JsonSchema:
    """Returns the schema of a complete FineTuneJob."""
    return {
        "description": FineTuneJob.__doc__,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "finetune-operator.io/v1alpha1"},
            "kind": {"type": "string", "description": "FineTuneJob"},
            "metadata": {"type": "object"},
            "spec": object_schema(Spec),
            "status": {**object_schema(Status, with_defaults=False), "default": _FIRST_STATUS},
        },
        "x-kubernetes-validations": [
            {
                "rule": f"self.metadata.name.size() <= {MAX_NAME_LENGTH}"
                f" && self.metadata.name.matches({cel_string(NAME_PATTERN)})",
                "message": f"metadata.name {NAME_MESSAGE}",
            },
            *stopped_rules(),
        ],
    }


def object_schema(model: type[Model], *, with_defaults: bool = True) -> JsonSchema:
    """Returns the structural schema of a model, with its rules and the immutability of its fields.

    Defaults are left out unless `with_defaults`.
    """
    raw = model.model_json_schema(by_alias=True)
    properties: JsonSchema = {}
    required: list[str] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        nested = model_in(field.annotation)
        schema = _nested(raw["properties"][key], nested, with_defaults) if nested else _scalar(raw["properties"][key])
        if field.is_required():
            required.append(key)
        default = {} if field.is_required() else _default(field.get_default(call_default_factory=True))
        rules = [*schema.pop("x-kubernetes-validations", ()), *field_rule(model, key)]
        properties[key] = {
            "description": field.description,
            **schema,
            **({"x-kubernetes-validations": rules} if rules else {}),
            **(default if with_defaults else {}),
        }
    validations = [*_rules(model.rules), *section_rules(model)]
    return {
        "description": _sentence(model.__doc__),
        "type": "object",
        **({"required": required} if required else {}),
        "properties": properties,
        **({"x-kubernetes-validations": validations} if validations else {}),
    }


def _nested(raw: JsonSchema, model: type[Model], with_defaults: bool) -> JsonSchema:
    inner = object_schema(model, with_defaults=with_defaults)
    if raw.get("type") != "array":
        return {key: value for key, value in inner.items() if key != "description"}
    list_type = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]} if model is Condition else {}
    return {"type": "array", **_selected(raw, "maxItems", "minItems"), **list_type, "items": inner}


def _scalar(raw: JsonSchema) -> JsonSchema:
    """Returns the schema of a field without a nested model: a string, number, enum, list or map.

    Raises ValueError for a union, which a structural schema can't express.
    """
    choices = [choice for choice in raw.get("anyOf", [raw]) if choice.get("type") != "null"]
    if len(choices) != 1:
        raise ValueError(f"a structural schema has no unions: {raw}")
    choice = choices[0]
    if choice.get("x-kubernetes-int-or-string"):
        return _selected(choice, "x-kubernetes-int-or-string", "pattern", "maxLength", "minimum", "maximum")
    match choice["type"]:
        case "array":
            return {
                "type": "array",
                **_selected(choice, "minItems", "maxItems"),
                "items": _scalar(choice["items"]),
            }
        case "object":
            return _map(choice)
        case "string":
            return {"type": "string", **_selected(choice, "enum", "pattern", "minLength", "maxLength")}
        case "integer":
            return {"type": "integer", "format": "int64", **_selected(choice, "minimum", "maximum")}
        case "number":
            return {"type": "number", **_bounds(choice)}
        case kind:
            return {"type": kind}


def _map(raw: JsonSchema) -> JsonSchema:
    """Returns the schema of a map of strings.

    Raises ValueError if its keys have more than one pattern, which a structural schema can't
    express.
    """
    (key_pattern, values), *other_patterns = raw.get("patternProperties", {}).items()
    if other_patterns:
        raise ValueError(f"a map has one kind of key: {raw}")
    max_key_length = raw["propertyNames"]["maxLength"]
    return {
        "type": "object",
        **_selected(raw, "maxProperties"),
        "additionalProperties": _scalar(values),
        "x-kubernetes-validations": [
            {
                "rule": f"self.all(k, k.size() <= {max_key_length} && k.matches({cel_string(key_pattern)}))",
                "message": "keys must be qualified names such as example.com/name",
            }
        ],
    }


def _bounds(raw: JsonSchema) -> JsonSchema:
    """Converts bounds: OpenAPI v3.0 has a flag for exclusiveMinimum, JSON Schema 2020 a number."""
    bounds = _selected(raw, "minimum", "maximum")
    for edge, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if flag in raw:
            bounds |= {edge: raw[flag], flag: True}
    return bounds


def _rules(rules: tuple[Rule, ...]) -> list[JsonSchema]:
    return [{"rule": rule.cel, "message": rule.message, "fieldPath": f".{rule.field}"} for rule in rules]


def _default(value: Any) -> JsonSchema:
    if value is None:
        return {}
    if isinstance(value, Model):
        # It has all fields, since the API server checks the rules of a default before it fills in
        # nested defaults.
        return {"default": value.to_json()}
    return {"default": list(value) if isinstance(value, tuple) else value}


def _selected(raw: JsonSchema, *keys: str) -> JsonSchema:
    return {key: raw[key] for key in keys if key in raw}


def _sentence(docstring: str | None) -> str:
    """Returns a docstring on one line."""
    return " ".join((docstring or "").split())


def _column(path: str, kind: str, name: str, description: str, priority: int) -> JsonSchema:
    return {
        "name": name,
        "type": kind,
        "jsonPath": path,
        **({"description": description} if description else {}),
        **({"priority": priority} if priority else {}),
    }
