"""readings: typed FineTuneJobs out of raw bodies. A spec is read once a generation, since it can't have changed since.

Used by reconcile alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api import resource
from finetune_api.resource import FineTuneJob, Metadata, Spec
from finetune_api.status import Status
from finetune_operator.cache import Key


@dataclass(frozen=True)
class _Reading:
    uid: str
    generation: int
    spec: Spec


class Readings:
    """The newest spec of each job."""

    def __init__(self) -> None:
        self._known: dict[Key, _Reading] = {}

    def job(self, key: Key, body: Mapping[str, Any]) -> FineTuneJob:
        """Raises pydantic.ValidationError."""
        meta = body["metadata"]
        known = self._known.get(key)
        if known and (known.uid, known.generation) == (meta["uid"], meta["generation"]):
            metadata = Metadata.model_validate(meta)
            return FineTuneJob(
                metadata=metadata, spec=known.spec, status=Status.model_validate(body.get("status") or {})
            )
        job = resource.parse(body)
        self._known[key] = _Reading(meta["uid"], meta["generation"], job.spec)
        return job

    def forget(self, key: Key) -> None:
        self._known.pop(key, None)
