"""Writes the labeled regions of a text, and the relations between them, as JSON.

    [{"text": "Alice", "labels": ["PER"], "start": 0, "end": 5}, …]
    {"regions": [{"id": 1, "text": …}, …],
     "relations": [{"from": 1, "to": 2, "labels": ["lives in"]}]}

Regions are in the order of the text. Regions of images, sounds and videos aren't text, and a
ValueError says so. The module is pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from finetune_trainer.data.reading.row import short_repr

_NO_TEXT = "is none of the regions of a text with a place (start, end) and labels; use a TextArea or Choices"


def is_region(value: Any) -> bool:
    """Whether a value of an annotation labels a part of a text or of something else."""
    return isinstance(value, Mapping) and (
        "start" in value or any(isinstance(key, str) and key.endswith("labels") for key in value)
    )


def as_json(regions: Iterable[tuple[str, Mapping[str, Any]]], relations: Iterable[Mapping[str, Any]], text: str) -> str:
    """Return regions of a text, each with its id, and relations between their ids.

    Raises ValueError for a region of something else, or a relation of unknown regions.
    """
    written = sorted(((_region(value, text), name) for name, value in regions), key=_place)
    numbers = {name: number for number, (_, name) in enumerate(written, start=1)}
    named = [_relation(relation, numbers) for relation in relations]
    listed = [region for region, _ in written]
    if not named:
        return json.dumps(listed, ensure_ascii=False)
    numbered = [{"id": number, **region} for number, region in enumerate(listed, start=1)]
    return json.dumps({"regions": numbered, "relations": named}, ensure_ascii=False)


def _place(region: tuple[dict[str, Any], str]) -> tuple[int, int]:
    return region[0]["start"], region[0]["end"]


def _region(value: Mapping[str, Any], text: str) -> dict[str, Any]:
    offsets = value.get("globalOffsets", value)
    start, end = (offsets.get(key) if isinstance(offsets, Mapping) else None for key in ("start", "end"))
    key = next((key for key in value if isinstance(key, str) and key.endswith("labels")), None)
    labels = value[key] if key else None
    if not isinstance(start, int) or not isinstance(end, int) or not isinstance(labels, list):
        raise ValueError(f"the annotation {short_repr(dict(value))} {_NO_TEXT}")
    if not 0 <= start <= end <= len(text):
        raise ValueError(f"the region {start} to {end} isn't in its text, which has {len(text)} characters")
    content = value.get("text")
    return {
        "text": content if isinstance(content, str) else text[start:end],
        "labels": labels,
        "start": start,
        "end": end,
    }


def _relation(relation: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    ends = [str(relation.get(key)) for key in ("from_id", "to_id")]
    unknown = next((end for end in ends if end not in numbers), None)
    if unknown is not None:
        raise ValueError(f"a relation refers to {unknown!r}, which is no region of the answer")
    first, second = (numbers[end] for end in ends)
    direction = relation.get("direction", "right")
    if direction == "left":
        first, second = second, first
    both = {"direction": "both"} if direction == "bi" else {}
    return {"from": first, "to": second, "labels": relation.get("labels") or [], **both}
