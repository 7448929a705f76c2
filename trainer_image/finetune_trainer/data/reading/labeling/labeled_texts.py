"""Gives rows of Prodigy, Doccano, spaCy and Argilla the keys prompt and completion.

What people labeled in a text would vanish if only the text were read. Labeled parts of a text are
the answer as JSON, as those of Label Studio. The module is pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading.labeling import regions
from finetune_trainer.data.reading.row import Unlabelled, short_repr

_OF_SPANS = ("spans", "entities", "ents")  # even without any
_SPANS = (*_OF_SPANS, "label", "labels", "annotation")
_OF_PRODIGY = ("spans", "tokens", "options", "user_input", "_task_hash", "_input_hash")
_DECISIONS = ("accept", "reject", "ignore")
_STARTS, _ENDS, _NAMES = ("start", "start_offset"), ("end", "end_offset"), ("label", "type", "entity")
_RELATIONS = "relations"


def normalized(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record with what was labeled in its text as the completion, or the record itself if
    nothing was.

    Raises Unlabelled for a label that wasn't accepted, and ValueError for a part outside the text.
    """
    text = value.get("text")
    if not isinstance(text, str) or len(value) == 1 or "completion" in value or "prompt" in value:
        return value
    if value.get("answer") in _DECISIONS and any(key in value for key in _OF_PRODIGY):
        return _of_prodigy(value, text)
    key = next((key for key in _SPANS if _are_spans(value.get(key), or_none=key in _OF_SPANS)), None)
    if key is not None:
        return _answered(
            value,
            (key, _RELATIONS, *(("status",) if key == "annotation" else ())),
            _as_json(value[key], value.get(_RELATIONS), text),
        )
    annotation = value.get("annotation")
    if annotation and "status" in value:
        labels = annotation if isinstance(annotation, list) else [annotation]
        if all(isinstance(label, str) for label in labels):
            return _answered(value, ("annotation", "status"), ", ".join(labels))
    return value


def _of_prodigy(value: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    if value["answer"] != "accept":
        raise Unlabelled(f"its label wasn't accepted (answer is {value['answer']!r})")
    if isinstance(value.get("options"), list) and isinstance(value.get("accept"), list):
        options = [option for option in value["options"] if isinstance(option, Mapping)]
        names = {str(option.get("id")): str(option.get("text", option.get("id"))) for option in options}
        chosen = [names.get(str(name), str(name)) for name in value["accept"]]
        if not chosen:
            raise Unlabelled("has no label: none of its options was chosen")
        return _answered(value, ("options", "accept", "answer"), ", ".join(chosen))
    if isinstance(value.get("user_input"), str):
        return _answered(value, ("user_input", "answer"), value["user_input"])
    if any(key in value for key in ("label", "labels")):
        return value
    return _answered(value, ("spans", "answer", _RELATIONS), _as_json(value.get("spans"), None, text))


def _answered(value: Mapping[str, Any], read: tuple[str, ...], answer: str) -> Mapping[str, Any]:
    rest = {key: inner for key, inner in value.items() if key != "text" and key not in read}
    return {**rest, "prompt": value["text"], "completion": answer}


def _are_spans(value: Any, *, or_none: bool) -> bool:
    return isinstance(value, list) and (bool(value) or or_none) and all(_span(entry) is not None for entry in value)


def _span(entry: Any) -> dict[str, Any] | None:
    """Return a labeled part of a text as Label Studio has it: start, end and labels."""
    identity: Any = None
    if isinstance(entry, Mapping):
        start, end, name = (_first(entry, keys) for keys in (_STARTS, _ENDS, _NAMES))
        identity = entry.get("id")
    elif isinstance(entry, list) and len(entry) >= 3:
        start, end, name = entry[:3] if isinstance(entry[0], int) else (entry[1], entry[2], entry[0])
    else:
        return None
    if not isinstance(name, str) or any(type(place) is not int for place in (start, end)):
        return None
    return {"start": start, "end": end, "labels": [name], "id": identity}


def _first(entry: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((entry[name] for name in names if name in entry), None)


def _as_json(entries: Any, relations: Any, text: str) -> str:
    entries = [] if entries is None else entries
    if not isinstance(entries, list):
        raise ValueError(f"spans is {short_repr(entries)}; it must be a list of labeled parts of the text")
    spans = [span for entry in entries if (span := _span(entry)) is not None]
    if len(spans) < len(entries):
        raise ValueError("spans has an entry without a start, an end and a label; write the labels as completion")
    labeled = [(str(index if span["id"] is None else span["id"]), span) for index, span in enumerate(spans)]
    named = [
        {**relation, "labels": [relation["type"]]} if "type" in relation else relation
        for relation in (relations if isinstance(relations, list) else [])
        if isinstance(relation, Mapping)
    ]
    return regions.as_json(labeled, named, text)
