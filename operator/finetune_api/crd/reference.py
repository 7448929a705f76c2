"""Renders docs/reference.md and docs/troubleshooting.md from the models and the table of reasons.

It returns text and does no I/O.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

from finetune_api.base import Model, Rule, model_in
from finetune_api.crd.schema import JsonSchema, object_schema
from finetune_api.crd.transitions import MUTABLE, STOPPED_PHASES, WHILE_STOPPED
from finetune_api.names import API_VERSION, KIND, SHORT_NAME
from finetune_api.reasons import REASONS, Reason
from finetune_api.resource import Spec
from finetune_api.status import Status

NOT_YET = "is not supported yet"
_ANY_TIME = "May change at any time."
_STOPPED = "May change while no pods run."


def reference() -> str:
    """Returns the page that lists every field: type, default, range, meaning and rules."""
    return "\n".join(
        [
            f"# {KIND}, `{API_VERSION}`",
            "",
            f"Short name `{SHORT_NAME}`, category `ml`, namespaced. `kubectl explain {SHORT_NAME}.spec` shows the "
            "same text.",
            "",
            "- A field without a default is absent unless it is set. **required** fields must be set.",
            _wrapped(
                f"- After creation, a field of `spec` can be changed if its meaning ends with *{_ANY_TIME}* or "
                f"*{_STOPPED}* (with all fields in it). No pods run in the phases {', '.join(STOPPED_PHASES)}; a "
                "change that also sets `runPolicy.suspend` is accepted in any phase, because it stops them. It takes "
                "effect with the next pods: those that wait and haven't started are replaced, and a job that has "
                "failed is tried again when `runPolicy.retry` is raised, which the same change can do. All other "
                "fields decide what is computed and can't be changed: create a new job."
            ),
            _wrapped(
                "- The API server rejects unknown fields and violations of the rules below, and names the field; "
                "`finetune validate FILE` does the same without a cluster."
            ),
            "- *Not supported yet* marks a value that is part of the API but that this version rejects.",
            "- `metadata.name` has at most 50 characters, because the names of the pods start with it.",
            "",
            *_section("spec", Spec),
            *_section("status", Status),
        ]
    )


def _section(path: str, model: type[Model]) -> list[str]:
    schema = object_schema(model, with_defaults=path.startswith("spec"))
    lines = [f"## {path}", "", _wrapped(schema["description"]), ""]
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
    meaning = f"{field['description'] or ''}{_when_changeable(path, key)}"
    return f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(meaning)} |"


def _when_changeable(path: str, key: str) -> str:
    """Returns when a field may be changed, as a sentence; empty for one that never may."""
    place = (path.removeprefix("spec."), key)
    if not path.startswith("spec.") or place not in MUTABLE | WHILE_STOPPED:
        return ""
    return f" *{_ANY_TIME if place in MUTABLE else _STOPPED}*"


def _anchor(path: str, key: str) -> str:
    """Returns the anchor of the heading `path.key`; renderers drop its dots and brackets."""
    return f"{path}{key}".replace(".", "").replace("[]", "").lower()


def type_name(field: JsonSchema) -> str:
    """Describes the type of a scalar field and its range in words."""
    if field.get("x-kubernetes-int-or-string"):
        return "`auto` or integer, at least 1" if field["pattern"] == "^auto$" else "quantity"
    match field["type"]:
        case "array":
            length = _between(field.get("minItems"), field.get("maxItems"), "entries")
            return f"list of {type_name(field['items'])}{length}"
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
    bounds = []
    if "minimum" in field:
        bounds.append(f"{'more than' if field.get('exclusiveMinimum') else 'at least'} {field['minimum']}")
    if "maximum" in field:
        bounds.append(f"{'less than' if field.get('exclusiveMaximum') else 'at most'} {field['maximum']}")
    return "".join(f", {bound}" for bound in bounds)


def _between(low: Any, high: Any, noun: str) -> str:
    bounds = [f"at least {low}"] if low else []
    bounds += [f"at most {high}"] if high else []
    return f", {' and '.join(bounds)} {noun}" if bounds else ""


def _default(field: JsonSchema, has_fields: bool) -> str:
    if "default" not in field:
        return ""
    if has_fields and field["type"] == "object":
        return "`{}`"  # its fields list their own defaults
    return f"`{json.dumps(field['default'])}`"


def _rules(rules: tuple[Rule, ...]) -> list[str]:
    lines = [
        _wrapped(
            f"- *Not supported yet*: `{rule.field}`: {rule.message.replace(' ' + NOT_YET, '')}."
            if NOT_YET in rule.message
            else f"- `{rule.field}`: {rule.message}."
        )
        for rule in rules
    ]
    return [*lines, ""] if lines else []


# What isn't the reason of a failure, but needs an explanation: titles, and their paragraphs.
_TOPICS = (
    (
        "Straggler",
        (
            "This is not a failure but an Event and `status.progress.straggler`: in more than half of the last 20 "
            "steps, the same rank needed at least 20% longer per token than the median of the others, which all "
            "wait for it.",
            "Compare `finetune_gpu_sm_clock_hertz`, `finetune_gpu_throttled` and "
            "`finetune_gpu_temperature_celsius` of its GPU with the others, and look for other load on its node. "
            "A pod on another node (cordon this one, then delete the pod) costs one restart from the last "
            "checkpoint.",
        ),
    ),
    (
        "OperatorError and StatusRefused",
        (
            "The job's phase remains, and other jobs aren't affected. With the reason OperatorError in the "
            "condition Reconciling, the operator couldn't process the job; its log has the traceback, and it "
            "tries again after at most a minute. If the message says that the API server refuses the full "
            "status, the status lacks progress, figures and texts; an admission policy or the size of the "
            "job are possible causes.",
        ),
    ),
    (
        "NodeSilent",
        (
            "This is not a failure but an Event and `status.reason`: the node controller reports that a node with "
            "pods of the job doesn't answer. If it doesn't come back within 5 minutes, the attempt ends with NodeLost, "
            "and the job goes on elsewhere. A pod that outlives its grace period by a minute, because it was deleted "
            "or because somebody forced its deletion, is lost as well.",
            "Nothing to do for the job. If the node comes back, it removes the old pods by itself.",
        ),
    ),
    (
        "OperatorTooOld and SpecUnreadable",
        (
            "The condition Stalled has one of these reasons if the CRD is newer than the operator, or older. The job "
            "hasn't failed, and pods that run continue; but no new ones are created. OperatorTooOld names fields that "
            "this operator doesn't know and that aren't at their defaults; SpecUnreadable names values that it can't "
            "read.",
            "Upgrade the operator (or the CRD) so that both have the same version. The job continues by itself.",
        ),
    ),
    (
        "The host's memory",
        (
            "A job that ends with InvalidConfig and the field `resources.memory` lacks memory of the host, not of its "
            "GPUs: the message has what loading, training with copies for checkpoints, or saving takes, and how much "
            "is missing. `finetune plan FILE --model DIR` shows the three figures in advance.",
            "If a container is killed for memory, Kubernetes kills all of its processes at once, so nothing is "
            "reported by them. The supervisor has noted before that memory was scarce, and the next attempt begins "
            "with smaller micro-batches. On CPUs that helps; on GPUs, where the host has only copies for checkpoints "
            "and what is offloaded, raise `resources.memory`.",
        ),
    ),
    (
        "Overfitting",
        (
            "This is not a failure but an Event and `status.evaluation.overfitting`: over at least two "
            "evaluations the validation loss rose by at least 1% while the training loss fell. The model is "
            "memorizing its training rows.",
            "With `training.keepBest` (the default), the weights from before the rise are written. For the next "
            "run, use fewer `training.epochs`, `training.earlyStopping`, more rows, a smaller `method.lora.rank` "
            "or more dropout.",
        ),
    ),
    (
        "DataWarning",
        (
            "This is not a failure but an Event, a warning of the data report and of `status.data`. It counts what of "
            "the rows isn't trained on, or not as it may be meant, and names the first row.",
            "KeysNotRead: nothing reads a key; map it in `dataset.columns`, or remove it. TemplateOmits: the chat "
            "template leaves a part out; set `dataset.chatTemplate` to one that writes it. AnswersApart: answers are "
            "examples of their own, which costs time; `dataset.rendering.answers: last` trains on the last one only. "
            "AnswersNotTrained: raise `dataset.maxSequenceLength`.",
            "ControlTokens and RenderedTwice: texts look like the border of a turn; remove the tokens, set "
            "`dataset.rendering.controlTokens: encode` (they become plain text) or `refuse`, or `dataset.chatTemplate: "
            "none` if they were rendered already. Blanks: `dataset.rendering.whitespace: strip`. TemplateVaries: the "
            "template picks at random or writes dates (`dataset.rendering.date`). CallsAsText, TagsTwice, BrokenText, "
            "OpenReasoning, ReasoningOnly, EmptyAnswers, EmptyQuestions, AnswersShared, TurnsCut: look at the rows.",
        ),
    ),
)


def troubleshooting() -> str:
    """Returns the page that lists every reason why an attempt or a job fails, and what to do."""
    return "\n".join(
        [
            "# Troubleshooting",
            "",
            _wrapped(
                "`status.failure.reason`, which is also the reason of the `Failed` condition, is one of the names "
                "below. Its cause decides whether the job is restarted:"
            ),
            "",
            _wrapped(
                "- **user**: the job fails immediately. Fix the cause, then raise `runPolicy.retry`: the job resumes "
                "from its last checkpoint. The [reference](reference.md) says which fields can be changed; if the "
                "cause is in another one, create a new job."
            ),
            _wrapped(
                "- **application**: the whole group restarts from the last checkpoint, at most "
                "`runPolicy.maxRestarts.application` times."
            ),
            _wrapped(
                "- **memory**: the same, at most `runPolicy.maxRestarts.memory` times, each time with micro-batches "
                "half as large."
            ),
            "- **infrastructure**: the same, at most `runPolicy.maxRestarts.infrastructure` times.",
            _wrapped(
                "- **preemption**: the same, at most `runPolicy.maxRestarts.preemption` times, which is large by "
                "default."
            ),
            "",
            _wrapped(
                "If a job is waiting, `status.message` (`kubectl get ftj -o wide`) explains why: it quotes the "
                "scheduler if no node has capacity, and the kubelet if a Secret or a PersistentVolumeClaim is missing. "
                "UnknownNetwork, ImageNotAllowed and CsiDriverNotAllowed mean that the administrator doesn't offer "
                "what pod.network, pod.image or pod.volumes names, and NotAllowed that the job names something that no "
                "list of the administrator and no label of its owner allows; the job starts once that has changed. "
                "GroupIncomplete means that only a part of the pods got nodes, which they gave back; the message says "
                "when the next try starts. `status.message` is shortened; the condition has all of it (`kubectl "
                "describe ftj NAME`)."
            ),
            "",
            *(line for reason in REASONS.values() for line in _reason(reason)),
            *(line for title, paragraphs in _TOPICS for line in _topic(title, paragraphs)),
        ]
    )


def _topic(title: str, paragraphs: tuple[str, ...]) -> list[str]:
    return [f"## {title}", "", *(line for text in paragraphs for line in (_wrapped(text), ""))]


def _reason(reason: Reason) -> list[str]:
    code = f" Exit code of the pod: {reason.exit_code}." if reason.exit_code else ""
    meaning = _wrapped(f"{reason.meaning} Cause: {reason.cause}.{code}")
    return [f"## {reason.name}", "", meaning, "", _wrapped(reason.hint), ""]


def _wrapped(text: str) -> str:
    """Wraps a paragraph or a list item at 100 characters."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
