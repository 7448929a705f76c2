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
    unknown: tuple[str, ...]  # fields that this version doesn't know and that have an effect


class SpecCache:
    """Keeps the newest parsed spec of each job."""

    def __init__(self) -> None:
        self._specs: dict[Key, _ParsedSpec] = {}

    def job(self, key: Key, body: Mapping[str, Any], unknown: tuple[str, ...] = ()) -> FineTuneJob:
        """Returns the typed job of a raw body, from which the `unknown` fields have been removed.

        Raises pydantic.ValidationError if it is invalid.
        """
        meta = body["metadata"]
        parsed = self._specs.get(key)
        if parsed and (parsed.uid, parsed.generation) == (meta["uid"], meta["generation"]):
            metadata = Metadata.model_validate(meta)
            return FineTuneJob(metadata=metadata, spec=parsed.spec, status=status.read(body.get("status")))
        job = resource.parse({**body, "status": {}})
        self._specs[key] = _ParsedSpec(meta["uid"], meta["generation"], job.spec, unknown)
        return job.model_copy(update={"status": status.read(body.get("status"))})

    def unknown(self, key: Key) -> tuple[str, ...]:
        """Returns the unknown fields of the newest spec."""
        return self._specs[key].unknown if key in self._specs else ()

    def forget(self, key: Key) -> None:
        """Removes the spec of a job that is gone."""
        self._specs.pop(key, None)
