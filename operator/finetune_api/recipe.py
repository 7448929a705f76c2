"""Computes what of a spec decides which weights a training run computes, as digests by section.

Two jobs with the same recipe compute the same weights, so one may resume from the checkpoints of
the other. Where the pods run, and on how many, isn't part of it. It does no I/O.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from finetune_api.resource import Spec

SECTIONS = ("model", "dataset", "method", "training")
_WITHOUT_EFFECT = frozenset(
    {"credentialsRef", "allowedLicenses", "microBatchSize", "activationCheckpointing", "compile"}
)


def digests(spec: Spec) -> dict[str, str]:
    """Returns the first 16 hex digits of the sha256 of each section, by its name."""
    content = spec.to_json()
    return {name: _digest(content.get(name)) for name in SECTIONS}


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the sections in which two recipes differ."""
    return tuple(name for name in SECTIONS if first.get(name) != second.get(name))


def _digest(section: Any) -> str:
    text = json.dumps(_relevant(section), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _relevant(value: Any) -> Any:
    """Returns a section without the fields that change by whose rights or how it is computed, and
    not what."""
    if isinstance(value, dict):
        return {key: _relevant(item) for key, item in value.items() if key not in _WITHOUT_EFFECT}
    return [_relevant(item) for item in value] if isinstance(value, list) else value
