"""The CustomResourceDefinition of FineTuneJob, made out of the pydantic models: structural OpenAPI v3, defaults, CEL.

Called by `generate` (and by tests). Pure: returns plain values, writes nothing.
"""

from __future__ import annotations

from typing import Any

from finetune_api.model import Model, Rule, model_in
from finetune_api.names import GROUP, KIND, MAX_NAME_LENGTH, PLURAL, SHORT_NAME, SINGULAR, VERSION
from finetune_api.resource import FineTuneJob, Spec
from finetune_api.scalars import NAME_PATTERN
from finetune_api.status import Condition, Status
from finetune_api.transitions import IMMUTABLE, immutable_message, is_immutable

JsonSchema = dict[str, Any]

NAME_MESSAGE = f"must be at most {MAX_NAME_LENGTH} lower-case letters, digits and dashes, beginning with a letter"

# jsonPath, type, name, description, priority (1 is shown by -o wide)
_COLUMNS = (
    (".status.phase", "string", "Phase", "Summary of the conditions.", 0),
    (".status.progress.step", "integer", "Step", "Optimizer steps done.", 0),
    (".status.progress.percent", "integer", "%", "Share of the steps that is done.", 0),
    (".status.progress.trainLoss", "number", "Loss", "Training loss of the last step.", 0),
    (".status.progress.etaSeconds", "integer", "ETA", "Seconds of training left.", 0),
    (".status.gpus", "integer", "GPUs", "GPUs in all.", 0),
    (".status.restartsTotal", "integer", "Restarts", "Restarts of the whole group.", 0),
    (".metadata.creationTimestamp", "date", "Age", "", 0),
    (".status.progress.message", "string", "Doing", "What the trainer does now.", 1),
    (".status.progress.evalLoss", "number", "Eval-Loss", "Loss on the validation rows.", 1),
    (".status.evaluation.testLossAfter", "number", "Test-Loss", "Loss of the result on the test rows.", 1),
    (".status.evaluation.scores[?(@.name=='rougeL')].tuned", "number", "Rouge-L", "Of the result's answers.", 1),
    (".status.message", "string", "Message", "What it waits for, or how it ended.", 1),
    (".spec.model.uri", "string", "Model", "The model that training starts from.", 1),
    (".spec.distribution.strategy", "string", "Strategy", "What is split between processes.", 1),
)


def custom_resource_definition() -> dict[str, Any]:
    """The apiextensions.k8s.io/v1 object, ready to be written as YAML."""
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
    """The schema of a whole FineTuneJob."""
    return {
        "description": FineTuneJob.__doc__,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "finetune-operator.io/v1alpha1"},
            "kind": {"type": "string", "description": "FineTuneJob"},
            "metadata": {"type": "object"},
            "spec": object_schema(Spec),
            "status": object_schema(Status, with_defaults=False),
        },
        "x-kubernetes-validations": [
            {
                "rule": f"self.metadata.name.size() <= {MAX_NAME_LENGTH}"
                f" && self.metadata.name.matches({cel_string(NAME_PATTERN)})",
                "message": f"metadata.name {NAME_MESSAGE}",
            }
        ],
    }


def object_schema(model: type[Model], *, with_defaults: bool = True) -> JsonSchema:
    """A model as a structural schema, its rules and the immutability of its fields included."""
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
        properties[key] = {
            "description": field.description,
            **schema,
            **(default if with_defaults else {}),
        }
    validations = [*_rules(model.rules), *_transitions(model)]
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
    keyed = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]} if model is Condition else {}
    return {"type": "array", **_kept(raw, "maxItems", "minItems"), **keyed, "items": inner}


def _scalar(raw: JsonSchema) -> JsonSchema:
    """Everything that holds no model: strings, numbers, enums, lists and maps of them."""
    choices = [choice for choice in raw.get("anyOf", [raw]) if choice.get("type") != "null"]
    if len(choices) != 1:
        raise ValueError(f"a structural schema has no unions: {raw}")
    choice = choices[0]
    if choice.get("x-kubernetes-int-or-string"):
        return _kept(choice, "x-kubernetes-int-or-string", "pattern", "maxLength", "minimum", "maximum")
    match choice["type"]:
        case "array":
            return {
                "type": "array",
                **_kept(choice, "minItems", "maxItems"),
                "items": _scalar(choice["items"]),
            }
        case "object":
            return _map(choice)
        case "string":
            return {"type": "string", **_kept(choice, "enum", "pattern", "minLength", "maxLength")}
        case "integer":
            return {"type": "integer", "format": "int64", **_kept(choice, "minimum", "maximum")}
        case "number":
            return {"type": "number", **_bounds(choice)}
        case kind:
            return {"type": kind}


def _map(raw: JsonSchema) -> JsonSchema:
    (key_pattern, values), *others = raw.get("patternProperties", {}).items()
    if others:
        raise ValueError(f"a map has one kind of key: {raw}")
    longest = raw["propertyNames"]["maxLength"]
    return {
        "type": "object",
        **_kept(raw, "maxProperties"),
        "additionalProperties": _scalar(values),
        "x-kubernetes-validations": [
            {
                "rule": f"self.all(k, k.size() <= {longest} && k.matches({cel_string(key_pattern)}))",
                "message": "keys must be qualified names such as example.com/name",
            }
        ],
    }


def cel_string(text: str) -> str:
    """A CEL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _bounds(raw: JsonSchema) -> JsonSchema:
    """OpenAPI v3.0 says exclusiveMinimum by a flag, JSON Schema 2020 by a number."""
    bounds = _kept(raw, "minimum", "maximum")
    for edge, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if flag in raw:
            bounds |= {edge: raw[flag], flag: True}
    return bounds


def _rules(rules: tuple[Rule, ...]) -> list[JsonSchema]:
    return [{"rule": rule.cel, "message": rule.message, "fieldPath": f".{rule.field}"} for rule in rules]


def _transitions(model: type[Model]) -> list[JsonSchema]:
    """A transition rule for each field of a section of spec that must not change."""
    section = IMMUTABLE.get(model)
    if section is None:
        return []
    rules = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if not is_immutable(section, key):
            continue
        optional = not field.is_required() and field.get_default(call_default_factory=True) is None
        same = f"self.{key} == oldSelf.{key}"
        rules.append(
            {
                "rule": f"has(self.{key}) ? has(oldSelf.{key}) && {same} : !has(oldSelf.{key})" if optional else same,
                "message": immutable_message(section, key),
                "fieldPath": f".{key}",
            }
        )
    if section == "runPolicy":
        rules.append(
            {
                "rule": "self.queueName == oldSelf.queueName || oldSelf.suspend",
                "message": "spec.runPolicy.queueName can be changed only while spec.runPolicy.suspend is true",
                "fieldPath": ".queueName",
            }
        )
    return rules


def _default(value: Any) -> JsonSchema:
    if value is None:
        return {}
    if isinstance(value, Model):
        # All of it: the API server asks the rules of a default before it fills in the defaults inside.
        return {"default": value.to_json()}
    return {"default": list(value) if isinstance(value, tuple) else value}


def _kept(raw: JsonSchema, *keys: str) -> JsonSchema:
    return {key: raw[key] for key in keys if key in raw}


def _sentence(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _column(path: str, kind: str, name: str, description: str, priority: int) -> JsonSchema:
    return {
        "name": name,
        "type": kind,
        "jsonPath": path,
        **({"description": description} if description else {}),
        **({"priority": priority} if priority else {}),
    }
