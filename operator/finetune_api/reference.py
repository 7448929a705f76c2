"""docs/reference.md and docs/troubleshooting.md out of the models and the table of reasons.

Called by `generate`. Pure: returns text.
"""

from __future__ import annotations

import json
from typing import Any

from finetune_api.model import Model, Rule, model_in
from finetune_api.names import API_VERSION, KIND, SHORT_NAME
from finetune_api.reasons import REASONS, Reason
from finetune_api.resource import Spec
from finetune_api.schema import JsonSchema, object_schema
from finetune_api.status import Status
from finetune_api.transitions import MUTABLE

NOT_YET = "is not supported yet"


def reference() -> str:
    """Every field of the resource: type, default, range, meaning and rules."""
    changeable = ", ".join(f"`{section}.{field}`" for section, field in sorted(MUTABLE))
    return "\n".join(
        [
            f"# {KIND}, `{API_VERSION}`",
            "",
            f"Short name `{SHORT_NAME}`, category `ml`, namespaced. The same text is in `kubectl explain "
            f"{SHORT_NAME}.spec --recursive`.",
            "",
            "- A field without a default is absent unless it is given. **required** fields must be given.",
            f"- Nothing in `spec` can be changed after creation but {changeable} (`queueName` only while suspended).",
            "- The API server refuses an unknown field or a broken rule, and names the field; "
            "`finetune validate FILE` does the same without a cluster.",
            "- *Not supported yet* marks what the resource already has room for and this version refuses.",
            "- `metadata.name` has at most 50 characters: it is the prefix of the pods' names.",
            "",
            *_section("spec", Spec),
            *_section("status", Status),
        ]
    )


def _section(path: str, model: type[Model]) -> list[str]:
    schema = object_schema(model, with_defaults=path.startswith("spec"))
    lines = [f"## {path}", "", schema["description"], ""]
    lines += ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    nested: list[tuple[str, type[Model]]] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner = model_in(field.annotation)
        is_list = schema["properties"][key]["type"] == "array" if inner else False
        if inner:
            nested.append((f"{path}.{key}{'[]' if is_list else ''}", inner))
        lines.append(_row(path, key, schema, inner, is_list))
    lines += ["", *_rules(model.rules)]
    for inner_path, inner in nested:
        lines += _section(inner_path, inner)
    return lines


def _row(path: str, key: str, schema: JsonSchema, inner: type[Model] | None, is_list: bool) -> str:
    field = schema["properties"][key]
    kind = f"[{'list of ' if is_list else ''}object](#{_anchor(path, key)})" if inner else type_name(field)
    default = "**required**" if key in schema.get("required", []) else _default(field, inner is not None)
    return f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(field['description'] or '')} |"


def _anchor(path: str, key: str) -> str:
    """How Markdown renderers name the heading `path.key` (dots and brackets vanish)."""
    return f"{path}{key}".replace(".", "").replace("[]", "").lower()


def type_name(field: JsonSchema) -> str:
    """A scalar's type in words, with its range."""
    if field.get("x-kubernetes-int-or-string"):
        return "`auto` or integer, at least 1" if field["pattern"] == "^auto$" else "quantity"
    match field["type"]:
        case "array":
            bounds = _between(field.get("minItems"), field.get("maxItems"), "entries")
            return f"list of {type_name(field['items'])}{bounds}"
        case "object":
            return f"map of strings, at most {field['maxProperties']} entries"
        case "string" if "enum" in field:
            return " | ".join(f"`{choice}`" for choice in field["enum"])
        case "string":
            return "string" + (f", at most {field['maxLength']} characters" if "maxLength" in field else "")
        case "integer" | "number":
            return f"{field['type']}{_range(field)}"
        case kind:
            return str(kind)


def _range(field: JsonSchema) -> str:
    words = []
    if "minimum" in field:
        words.append(f"{'more than' if field.get('exclusiveMinimum') else 'at least'} {field['minimum']}")
    if "maximum" in field:
        words.append(f"{'less than' if field.get('exclusiveMaximum') else 'at most'} {field['maximum']}")
    return "".join(f", {word}" for word in words)


def _between(low: Any, high: Any, what: str) -> str:
    words = [f"at least {low}"] if low else []
    words += [f"at most {high}"] if high else []
    return f", {' and '.join(words)} {what}" if words else ""


def _default(field: JsonSchema, has_fields: bool) -> str:
    if "default" not in field:
        return ""
    if has_fields and field["type"] == "object":
        return "`{}`"  # its fields tell theirs
    return f"`{json.dumps(field['default'])}`"


def _rules(rules: tuple[Rule, ...]) -> list[str]:
    lines = [
        f"- *Not supported yet*: `{rule.field}`: {rule.message.replace(' ' + NOT_YET, '')}."
        if NOT_YET in rule.message
        else f"- `{rule.field}` {rule.message}."
        for rule in rules
    ]
    return [*lines, ""] if lines else []


def troubleshooting() -> str:
    """Every reason by which an attempt or a job fails, and what to do."""
    return "\n".join(
        [
            "# Troubleshooting",
            "",
            "`status.failure.reason` (also the reason of the `Failed` condition) is one of these words. The cause says "
            "whether a restart can help:",
            "",
            "- **user**: the job fails at once; somebody must change something and create a new job.",
            "- **application**: the whole group restarts from the last checkpoint, "
            "`runPolicy.maxRestarts.application` times.",
            "- **infrastructure**: likewise, `runPolicy.maxRestarts.infrastructure` times.",
            "- **preemption**: it goes on from the last checkpoint, as often as it takes.",
            "",
            "A job that waits says what for in `status.message` (`kubectl get ftj -o wide`): the scheduler's words "
            "when no node has room, the kubelet's when a Secret or a claim is missing.",
            "",
            *(line for reason in REASONS.values() for line in _reason(reason)),
            "## Overfitting",
            "",
            "An Event and `status.evaluation.overfitting`, no failure: the validation loss rose in two evaluations or "
            "more, by 1 % or more, while the training loss fell. The model learns its rows by heart.",
            "",
            "`training.keepBest` (the default) writes the weights from before. For the next run: fewer "
            "`training.epochs`, `training.earlyStopping`, more rows, a smaller `method.lora.rank` or more dropout.",
            "",
        ]
    )


def _reason(reason: Reason) -> list[str]:
    code = f" Exit code of the pod: {reason.exit_code}." if reason.exit_code else ""
    return [f"## {reason.name}", "", f"{reason.meaning} Cause: {reason.cause}.{code}", "", reason.hint, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
