"""Turns exports of labeling tools into rows.

It reads exports of Label Studio (JSON, JSON-MIN, CSV) and Snorkel (labels or probabilities). The
export shows which key is the prompt and which is the answer if that is unambiguous; otherwise the
message asks for dataset.columns. The module is pure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.data.reading.labeling import regions
from finetune_trainer.data.reading.row import Omission, Row, Turn, Unlabelled, Values, printable, short_repr, text

_STUDIO_META = {
    "id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "file_upload",
    "comment_count", "unresolved_comment_count", "total_annotations",
}  # fmt: skip
_PROMPTS = ("prompt", "text", "question", "instruction", "input")
_ANSWERS = ("completion", "response", "answer", "output")
_LABELS = ("label", "labels", "preds", "pred", "prediction")
_PROBABILITIES = ("probs", "probabilities", "proba", "label_probs")
_NOT_ACCEPTED = ("reject", "ignore")  # of Prodigy
_NUMBERED = ("prob_", "probs_", "proba_", "probability_", "p_")


@dataclass(frozen=True)
class Options:
    """Holds what the job sets about an export.

    `columns` maps our name of a key to the file's. `labels[i]` is the name of Snorkel's class i.
    `min_probability` is the least probability that a label needs.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    min_probability: float = 0.0


def is_label_studio(value: Values) -> bool:
    """Whether a record is a task of Label Studio."""
    is_task = isinstance(value.get("data"), Mapping) and isinstance(value.get("annotations"), list)
    return is_task or ("annotation_id" in value and ("annotator" in value or "lead_time" in value))


def is_snorkel(value: Values) -> bool:
    """Whether a record has a text next to a class or the probabilities of its classes."""
    labeled = any(key in value for key in (*_LABELS, *_PROBABILITIES)) or bool(_numbered_keys(value))
    return labeled and any(value.get(key) is not None for key in _PROMPTS)


def label_studio(number: int, value: Values, options: Options) -> Row:
    """Read a task with its annotations (JSON), or one flat record of both (JSON-MIN, CSV)."""
    if isinstance(value.get("data"), Mapping):
        prompt, completion, used = _task(value, options)
    else:
        prompt, completion, used = _flat_record(value, options)
    if not completion.strip():
        raise ValueError("the annotation is empty")
    return Row(number, (Turn("user", prompt), Turn("assistant", completion)), plain=True, unread=_unread(value, used))


def snorkel(number: int, value: Values, options: Options) -> Row:
    """Read a text and its class, whose name is the answer.

    Raises Unlabelled for class -1, a tie, or a probability that is too low.
    """
    key = _key_of(value, _PROMPTS, "prompt")
    prompt = text(value, key)
    if value.get("answer") in _NOT_ACCEPTED:
        raise Unlabelled(f"its label wasn't accepted (answer is {value['answer']!r})")
    if not any(key in value for key in ("completion", *_LABELS, *_PROBABILITIES)) and not _numbered_keys(value):
        raise Unlabelled("has no label (not labeled yet; dataset.format: text trains on texts alone)")
    answer = _class_name(value, options)
    labels = {*_LABELS, *_PROBABILITIES, *_numbered_keys(value), "completion", key}
    labels |= {"answer"} if value.get("answer") == "accept" else set()
    unread = tuple(
        ("KeysNotRead", printable(name), 1) for name in sorted(set(value) - labels) if value[name] not in (None, "")
    )
    return Row(number, (Turn("user", prompt), Turn("assistant", answer)), plain=True, unread=unread)


FORMATS: dict[str, Callable[[int, Values, Options], Row]] = {"label-studio": label_studio, "snorkel": snorkel}


# ---- Label Studio


def _task(value: Values, options: Options) -> tuple[str, str, set[str]]:
    """Return the prompt, the answer, and what was used, as `_unread` names it."""
    annotations = [a for a in value.get("annotations") or [] if isinstance(a, Mapping) and not a.get("was_cancelled")]
    if not annotations:
        raise Unlabelled("has no annotation (not labeled yet, or skipped)")
    annotation = max(annotations, key=lambda a: (bool(a.get("ground_truth")), str(a.get("updated_at") or "")))
    results = [r for r in annotation.get("result") or [] if isinstance(r, Mapping) and "value" in r]
    names = sorted({str(r.get("from_name")) for r in results})
    answer = options.columns.get("completion") or (names[0] if len(names) == 1 else None)
    if answer is None and names:
        answer = next((name for name in _ANSWERS if name in names), None)
    if not names:
        raise Unlabelled("its annotation is empty (nothing was labeled)")
    if answer is None:
        raise ValueError(f"is annotated with {', '.join(names)}; name the answer in dataset.columns.completion")
    answers = [r for r in results if r.get("from_name") == answer]
    if not answers:
        raise ValueError(f"has no annotation {answer!r}")
    data = value["data"]
    subject = answers[0].get("to_name")
    texts = [key for key, inner in data.items() if isinstance(inner, str)]
    prompt = options.columns.get("prompt") or (subject if subject in texts else None)
    prompt = prompt or (texts[0] if len(texts) == 1 else next((name for name in _PROMPTS if name in texts), None))
    if prompt is None:
        raise ValueError(f"data has the keys {', '.join(sorted(data)[:8])}; name one in dataset.columns.prompt")
    question = text(data, prompt, "data.")
    used = {f"data.{prompt}", f"annotations.{answer}"}
    relations = [r for r in annotation["result"] if isinstance(r, Mapping) and r.get("type") == "relation"]
    if all(regions.is_region(result["value"]) for result in answers):
        labeled = [(str(result.get("id", index)), result["value"]) for index, result in enumerate(answers)]
        return question, regions.as_json(labeled, relations, question), used
    if relations:
        raise ValueError(
            f"{answer} has relations between parts that aren't regions of a text; use a TextArea or Choices"
        )
    return question, "\n".join(_as_text(result["value"], str(answer)) for result in answers), used


def _flat_record(value: Values, options: Options) -> tuple[str, str, set[str]]:
    keys = [key for key in value if key not in _STUDIO_META]
    prompt = "prompt" if "prompt" in options.columns else next((name for name in _PROMPTS if name in keys), None)
    rest = [key for key in keys if key != prompt]
    answer = "completion" if "completion" in options.columns else None
    answer = answer or next((name for name in (*_ANSWERS, *_LABELS) if name in rest), None)
    answer = answer or (rest[0] if len(rest) == 1 else None)
    if prompt is None and answer is not None:
        others = [key for key in keys if key != answer]
        prompt = others[0] if len(others) == 1 else None
    if prompt is None or answer is None:
        raise ValueError(
            f"has the keys {', '.join(keys[:8])}; name the prompt and the answer in dataset.columns (prompt, "
            "completion)"
        )
    if answer not in value or value[answer] in ("", None):
        raise Unlabelled(f"has no annotation {answer!r} (not labeled yet, or skipped)")
    question, labels = text(value, prompt), _parsed(value[answer])
    if isinstance(labels, list) and labels and all(map(regions.is_region, labels)):
        labeled = [(str(index), label) for index, label in enumerate(labels)]
        return question, regions.as_json(labeled, (), question), {prompt, answer}
    return question, _as_text(labels, answer), {prompt, answer}


def _unread(value: Values, used: set[str]) -> tuple[Omission, ...]:
    """Return what people put into an export and what isn't trained on."""
    data = value.get("data")
    if not isinstance(data, Mapping):
        names = {key for key in value if key not in _STUDIO_META and value[key] not in (None, "", [])}
    else:
        results = [r for a in value["annotations"] if isinstance(a, Mapping) for r in a.get("result") or []]
        names = {f"data.{key}" for key in data}
        names |= {f"annotations.{r['from_name']}" for r in results if isinstance(r, Mapping) and "from_name" in r}
    return tuple(("KeysNotRead", printable(name), 1) for name in sorted(names - used))


def _as_text(value: Any, name: str) -> str:
    """Return as text what a person wrote or chose."""
    if isinstance(value, Mapping):
        if regions.is_region(value):
            raise ValueError(f"{name} has regions of a text beside other answers; use only one of both")
        for key in ("text", "choices", "rating", "number", "taxonomy"):
            if key in value:
                return _as_text(value[key], name)
        raise ValueError(
            f"{name} is of type {', '.join(sorted(value)[:4])}, which isn't text; use a TextArea or Choices"
        )
    if isinstance(value, list):
        parts = [_as_text(part, name) for part in value]
        return ", ".join(parts)
    if isinstance(value, str):
        return text({name: value}, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}" if isinstance(value, float) else str(value)
    raise ValueError(f"{name} is {short_repr(value)}, which isn't text")


def _parsed(value: Any) -> Any:
    """Parse JSON text, which is how a CSV export holds lists and objects."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# ---- Snorkel


def _class_name(value: Values, options: Options) -> str:
    probabilities = _probabilities(value)
    if probabilities is not None:
        best = max(probabilities)
        if best <= 0 or probabilities.count(best) > 1:
            raise Unlabelled("the classes are equally probable: the label model abstains")
        if best < options.min_probability:
            raise Unlabelled(
                f"its most likely class has a probability of {best:.3g}, less than dataset.minLabelProbability "
                f"{options.min_probability:g}"
            )
        return _name_of(probabilities.index(best), options.labels)
    key = "completion" if "completion" in value else _key_of(value, _LABELS, "completion")
    label = value[key]
    if isinstance(label, list) and all(isinstance(name, str) for name in label):
        if not label:
            raise Unlabelled(f"{key} is []: it has no label")
        return ", ".join(text({key: name}, key) for name in label)
    if isinstance(label, str) and label.lstrip("-").isdecimal():
        label = int(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, str):
        name = text(value, key)
        if not name.strip():
            raise ValueError(f"{key} is empty")
        return name
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(
            f"{key} is {short_repr(label)}; it must be the number or the name of a class (write labels of parts of a "
            "text as prompt and completion)"
        )
    if label == -1:
        raise Unlabelled(f"{key} is -1: every labeling function abstains")
    return _name_of(label, options.labels)


def _name_of(index: int, labels: tuple[str, ...]) -> str:
    if not labels:
        raise ValueError(f"is of class {index}; name the classes in dataset.labels, in the order of their numbers")
    if not 0 <= index < len(labels):
        raise ValueError(f"is of class {index}, but dataset.labels names {len(labels)} classes")
    return labels[index]


def _probabilities(value: Values) -> list[float] | None:
    content: Any = next((value[name] for name in _PROBABILITIES if name in value), None)
    if content is None:
        keys = _numbered_keys(value)
        content = [value[key] for key in keys] if keys else None
    if content is None:
        return None
    if isinstance(content, str):
        try:
            content = json.loads(content if "," in content else ",".join(content.split()).replace("[,", "["))
        except (ValueError, RecursionError):
            raise ValueError(f"probabilities are {short_repr(content)}; they must be a list of numbers") from None
    try:
        probabilities = [float(probability) for probability in content]
    except (TypeError, ValueError):
        raise ValueError(f"probabilities are {short_repr(content)}; they must be a list of numbers") from None
    if not probabilities or not all(math.isfinite(p) and 0 <= p <= 1.000001 for p in probabilities):
        raise ValueError(f"probabilities are {short_repr(content)}; they must be numbers from 0 to 1")
    return probabilities


def _numbered_keys(value: Values) -> list[str]:
    """Return the keys prob_0, prob_1, ... in their order."""
    for stem in _NUMBERED:
        if f"{stem}0" in value and f"{stem}1" in value:
            count = next(i for i in range(len(value) + 1) if f"{stem}{i}" not in value)
            return [f"{stem}{i}" for i in range(count)]
    return []


def _key_of(value: Values, names: tuple[str, ...], ours: str) -> str:
    if ours in value:
        return ours
    key = next((name for name in names if name in value), None)
    if key is None:
        keys = ", ".join(sorted(value)[:8]) or "none"
        raise ValueError(f"has the keys {keys}; name one in dataset.columns.{ours}")
    return key
