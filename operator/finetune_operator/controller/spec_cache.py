"""Parses raw bodies into typed FineTuneJobs; a spec is parsed only once per generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api import resource, status
from finetune_api.resource import FineTuneJob, Metadata, Spec
from finetune_operator.controller.snapshot import Key


@dataclass(frozen=True)
class _ParsedSpec:
    """Holds a parsed spec and the generation of the object that it belongs to."""

    uid: str
    generation: int
    spec: Spec


class SpecCache:
    """Keeps the newest parsed spec of each job."""

    def __init__(self) -> None:
        self._specs: dict[Key, _ParsedSpec] = {}

    def job(self, key: Key, body: Mapping[str, Any]) -> FineTuneJob:
        """Returns the typed job of a raw body. Raises pydantic.ValidationError if it is invalid."""
        meta = body["metadata"]
        parsed = self._specs.get(key)
        if parsed and (parsed.uid, parsed.generation) == (meta["uid"], meta["generation"]):
            metadata = Metadata.model_validate(meta)
            return FineTuneJob(metadata=metadata, spec=parsed.spec, status=status.read(body.get("status")))
        job = resource.parse({**body, "status": {}})
        self._specs[key] = _ParsedSpec(meta["uid"], meta["generation"], job.spec)
        return job.model_copy(update={"status": status.read(body.get("status"))})

    def forget(self, key: Key) -> None:
        """Removes the spec of a job that is gone."""
        self._specs.pop(key, None)
