"""Reads the specs of FineTuneJobs, also those that were written for another version.

The CRD may be newer than the operator: during an upgrade, after a rollback, or because somebody
installs CRDs separately. A field that this version doesn't know is ignored if it has its default,
which the CRD gives it in every job; otherwise, the job may continue but gets no new pods. Nothing
here writes to the cluster.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_api import errors, names
from finetune_api.base import as_admitted
from finetune_api.resource import FineTuneJob
from finetune_operator.controller.snapshot import Key
from finetune_operator.controller.spec_cache import SpecCache
from finetune_operator.kube.client import ApiError, KubeClient

log = logging.getLogger(__name__)

_SCHEMA_SECONDS = 60.0  # for which a schema is used again
_RETRY_SECONDS = 5.0  # for one that is older than the CRD

Location = tuple[int | str, ...]


@dataclass(frozen=True)
class Reading:
    """Holds what a body says: a job, or why it can't be read.

    `unknown` are the fields that this version doesn't know and that aren't at their defaults.
    """

    job: FineTuneJob | None
    unknown: tuple[str, ...] = ()
    problem: str = ""


class SpecReader:
    """Reads bodies into typed jobs. A spec is parsed only once per generation."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._specs = SpecCache()
        self._schema: Mapping[str, Any] = {}
        self._schema_time = float("-inf")

    async def read(self, key: Key, body: Mapping[str, Any]) -> Reading:
        """Returns what a body says, as far as this version can read it. Never raises."""
        try:
            return Reading(self._specs.job(key, body), self._specs.unknown(key))
        except ValidationError as error:
            locations = errors.unknown_locations(error)
            if not locations:
                return Reading(None, problem="; ".join(errors.describe(error)))
        known = _without(body, locations)
        schema = await self._schema_with(locations)
        unknown = tuple(errors.path(location) for location in locations if not _is_default(body, schema, location))
        try:
            job = self._specs.job(key, known, unknown)
        except ValidationError as error:
            return Reading(None, problem="; ".join(errors.describe(error)))
        if any(_part(schema, location) is None for location in locations):
            self._specs.forget(key)  # the schema isn't published yet, so the next reading may differ
        ignored = [path for location in locations if (path := errors.path(location)) not in unknown]
        if ignored:
            log.warning(
                "fields of a newer CRD ignored, since they have their defaults: %s", ", ".join(ignored),
                extra={"namespace": key[0], "job": key[1]},
            )  # fmt: skip
        return Reading(job, unknown)

    def forget(self, key: Key) -> None:
        """Removes the spec of a job that is gone."""
        self._specs.forget(key)

    async def _schema_with(self, locations: tuple[Location, ...]) -> Mapping[str, Any]:
        """Returns the schema of FineTuneJob that the API server publishes, which should have fields
        at these locations; empty if it can't be read."""
        is_complete = all(_part(self._schema, location) is not None for location in locations)
        if time.monotonic() - self._schema_time < (_SCHEMA_SECONDS if is_complete else _RETRY_SECONDS):
            return self._schema
        try:
            document = await self._client.schemas(names.API_VERSION)
        except ApiError as error:
            log.warning("the schema of %s can't be read: %s", names.KIND, error)
            return self._schema
        self._schema = next((s for s in document.values() if _kind(s) == names.KIND), {})
        self._schema_time = time.monotonic()
        return self._schema


def _kind(schema: Mapping[str, Any]) -> str:
    kinds: Any = schema.get("x-kubernetes-group-version-kind") or ({},)
    return str(kinds[0].get("kind", ""))


def _without(body: Mapping[str, Any], locations: tuple[Location, ...]) -> Mapping[str, Any]:
    """Returns a body without the fields at some locations."""
    known = copy.deepcopy(dict(body))
    for location in locations:
        parent = _value(known, location[:-1])
        if isinstance(parent, dict):
            parent.pop(location[-1], None)
    return known


def _value(body: Any, location: Location) -> Any:
    for part in location:
        is_index = isinstance(part, int) and isinstance(body, list) and part < len(body)
        if not is_index and not (isinstance(body, Mapping) and part in body):
            return None
        body = body[part]
    return body


def _part(schema: Mapping[str, Any], location: Location) -> Mapping[str, Any] | None:
    """Returns the schema of the field at a location; None if there is none."""
    part: Any = schema
    for step in location:
        part = part.get("items") if isinstance(step, int) else (part.get("properties") or {}).get(step)
        if not isinstance(part, Mapping):
            return None
    return dict(part)


def _is_default(body: Mapping[str, Any], schema: Mapping[str, Any], location: Location) -> bool:
    part = _part(schema, location)
    if part is None or "default" not in part:
        return False
    default: Any = as_admitted(part["default"], None)
    return bool(as_admitted(_value(body, location), None) == default)
