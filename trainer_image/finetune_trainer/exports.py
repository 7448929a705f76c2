"""What labelling tools export → rows: Label Studio (JSON, JSON-MIN, CSV) and Snorkel (labels or probabilities). Pure.

Called by `rows`. Which key is the prompt and which the answer follows from the export where that is plain, else the
message asks for dataset.columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.shapes import Row, Turn, Values, shown, text

_STUDIO_META = {
    "id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "file_upload",
    "comment_count", "unresolved_comment_count", "total_annotations",
}  # fmt: skip
_PROMPTS = ("prompt", "text", "question", "instruction", "input")
_ANSWERS = ("completion", "response", "answer", "output")
_LABELS = ("label", "labels", "preds", "pred", "prediction")
_PROBABILITIES = ("probs", "probabilities", "proba", "label_probs")
_NUMBERED = ("prob_", "probs_", "proba_", "probability_", "p_")


@dataclass(frozen=True)
class Options:
    """`columns` as in the spec; `labels[i]` is the word for Snorkel's class i, `sure` the least probability of one."""

    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    sure: float = 0.0


class Unlabelled(ValueError):
    """There is no label, or none that is sure enough: nobody's mistake, so the row is left out and counted."""


def is_label_studio(value: Values) -> bool:
    full = isinstance(value.get("data"), Mapping) and isinstance(value.get("annotations"), list)
    return full or ("annotation_id" in value and ("annotator" in value or "lead_time" in value))


def is_snorkel(value: Values) -> bool:
    """A text with a class or its probabilities beside it."""
    labelled = any(key in value for key in (*_LABELS, *_PROBABILITIES)) or bool(_numbered(value))
    return labelled and any(key in value for key in _PROMPTS)


def label_studio(number: int, value: Values, options: Options) -> Row:
    """A task with its annotation (JSON), or one flat record of both (JSON-MIN, CSV)."""
    if isinstance(value.get("data"), Mapping):
        prompt, completion = _task(value, options)
    else:
        prompt, completion = _flat(value, options)
    if not completion.strip():
        raise ValueError("the annotation is empty")
    return Row(number, (Turn("user", prompt), Turn("assistant", completion)), plain=True)


def snorkel(number: int, value: Values, options: Options) -> Row:
    """The class that the label model gives, as a word. -1, a tie, or too small a probability: Unlabelled."""
    prompt = text(value, _only(value, _PROMPTS, "prompt"))
    word = _class(value, options)
    return Row(number, (Turn("user", prompt), Turn("assistant", word)), plain=True)


SHAPES: dict[str, Callable[[int, Values, Options], Row]] = {"label-studio": label_studio, "snorkel": snorkel}


# ---- Label Studio


def _task(value: Values, options: Options) -> tuple[str, str]:
    annotations = [a for a in value.get("annotations") or [] if isinstance(a, Mapping) and not a.get("was_cancelled")]
    if not annotations:
        raise Unlabelled("has no annotation (not labelled yet, or skipped)")
    chosen = max(annotations, key=lambda a: (bool(a.get("ground_truth")), str(a.get("updated_at") or "")))
    results = [r for r in chosen.get("result") or [] if isinstance(r, Mapping) and "value" in r]
    names = sorted({str(r.get("from_name")) for r in results})
    wanted = options.columns.get("completion") or (names[0] if len(names) == 1 else None)
    if wanted is None and names:
        wanted = next((name for name in _ANSWERS if name in names), None)
    if wanted is None:
        raise ValueError(
            f"is annotated with {', '.join(names) or 'nothing'}; name the answer in dataset.columns.completion"
        )
    answers = [r for r in results if r.get("from_name") == wanted]
    if not answers:
        raise ValueError(f"has no annotation {wanted!r}")
    data = value["data"]
    about = answers[0].get("to_name")
    texts = [key for key, inner in data.items() if isinstance(inner, str)]
    prompt = options.columns.get("prompt") or (about if about in texts else None)
    prompt = prompt or (texts[0] if len(texts) == 1 else next((name for name in _PROMPTS if name in texts), None))
    if prompt is None:
        raise ValueError(f"data has the keys {', '.join(sorted(data)[:8])}; name one in dataset.columns.prompt")
    return text(data, prompt, "data."), "\n".join(_value(answer["value"], str(wanted)) for answer in answers)


def _flat(value: Values, options: Options) -> tuple[str, str]:
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
        raise Unlabelled(f"has no annotation {answer!r} (not labelled yet, or skipped)")
    return text(value, prompt), _value(_unpacked(value[answer]), answer)


def _value(value: Any, name: str) -> str:
    """What a person wrote or chose, as text."""
    if isinstance(value, Mapping):
        for key in ("text", "choices", "rating", "number", "taxonomy"):
            if key in value:
                return _value(value[key], name)
        raise ValueError(
            f"{name} is of type {', '.join(sorted(value)[:4])}, which is no text; use a TextArea or Choices"
        )
    if isinstance(value, list):
        parts = [_value(part, name) for part in value]
        return ", ".join(parts)
    if isinstance(value, str):
        return text({name: value}, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}" if isinstance(value, float) else str(value)
    raise ValueError(f"{name} is {shown(value)}, which is no text")


def _unpacked(value: Any) -> Any:
    """A CSV export holds lists and objects as JSON text."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# ---- Snorkel


def _class(value: Values, options: Options) -> str:
    chances = _chances(value)
    if chances is not None:
        best = max(chances)
        if best <= 0 or chances.count(best) > 1:
            raise Unlabelled("the classes are equally probable: the label model abstains")
        if best < options.sure:
            raise Unlabelled(
                f"its likeliest class is {best:.3g} probable, less than dataset.minLabelProbability {options.sure:g}"
            )
        return _word(chances.index(best), options.labels)
    name = "completion" if "completion" in value else _only(value, _LABELS, "completion")
    label = value[name]
    if isinstance(label, str) and label.lstrip("-").isdecimal():
        label = int(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, str):
        word = text(value, name)
        if not word.strip():
            raise ValueError(f"{name} is empty")
        return word
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(f"{name} is {shown(label)}; it must be a class's number or word")
    if label == -1:
        raise Unlabelled(f"{name} is -1: every labelling function abstains")
    return _word(label, options.labels)


def _word(index: int, labels: tuple[str, ...]) -> str:
    if not labels:
        raise ValueError(f"is of class {index}; name the classes in dataset.labels, in the order of their numbers")
    if not 0 <= index < len(labels):
        raise ValueError(f"is of class {index}, and dataset.labels names {len(labels)} classes")
    return labels[index]


def _chances(value: Values) -> list[float] | None:
    found: Any = next((value[name] for name in _PROBABILITIES if name in value), None)
    if found is None:
        numbered = _numbered(value)
        found = [value[key] for key in numbered] if numbered else None
    if found is None:
        return None
    if isinstance(found, str):
        try:
            found = json.loads(found if "," in found else ",".join(found.split()).replace("[,", "["))
        except (ValueError, RecursionError):
            raise ValueError(f"probabilities are {shown(found)}; they must be a list of numbers") from None
    try:
        chances = [float(chance) for chance in found]
    except (TypeError, ValueError):
        raise ValueError(f"probabilities are {shown(found)}; they must be a list of numbers") from None
    if not chances or not all(math.isfinite(chance) and 0 <= chance <= 1.000001 for chance in chances):
        raise ValueError(f"probabilities are {shown(found)}; they must be numbers from 0 to 1")
    return chances


def _numbered(value: Values) -> list[str]:
    """prob_0, prob_1, … in their order."""
    for stem in _NUMBERED:
        if f"{stem}0" in value and f"{stem}1" in value:
            count = next(i for i in range(len(value) + 1) if f"{stem}{i}" not in value)
            return [f"{stem}{i}" for i in range(count)]
    return []


def _only(value: Values, names: tuple[str, ...], ours: str) -> str:
    if ours in value:
        return ours
    found = next((name for name in names if name in value), None)
    if found is None:
        keys = ", ".join(sorted(value)[:8]) or "none"
        raise ValueError(f"has the keys {keys}; name one in dataset.columns.{ours}")
    return found
