"""What lies in the destination already: nothing, this job's own result, or another job's. Asked before hardware is
spent. `look` reads, `probe` writes one tiny object and removes it; neither touches what is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune_api.manifest import Manifest
from finetune_api.names import CHECKPOINTS_DIR, FINETUNE_DIR, MANIFEST_PATH
from finetune_api.run import JobRef
from finetune_trainer.failure import Failed

if TYPE_CHECKING:
    from finetune_trainer.place import Place

_STEP = re.compile(rf"^{CHECKPOINTS_DIR}/step-(\d+)/manifest\.json$")


@dataclass(frozen=True)
class Destination:
    """`finished`: this job's own manifest and its bytes. `checkpoints`: steps with a manifest, newest first."""

    finished: tuple[Manifest, bytes] | None
    checkpoints: tuple[int, ...]


def look(place: Place, job: JobRef) -> Destination:
    """Raises Failed(OutputOccupied) when another job's result or checkpoint is there."""
    data = place.read(MANIFEST_PATH)
    if data is not None:
        return Destination((owned(data, job, place, MANIFEST_PATH), data), ())
    found = (_STEP.match(entry.path) for entry in place.list(CHECKPOINTS_DIR))
    steps = sorted((int(match.group(1)) for match in found if match), reverse=True)
    return Destination(None, tuple(steps))


def owned(data: bytes, job: JobRef, place: Place, path: str) -> Manifest:
    """The manifest in `data`, which must be this job's. Raises Failed(OutputOccupied) otherwise."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError:
        raise Failed(
            "OutputOccupied",
            f"output.uri: {place.display}/{path} isn't a manifest of ours; choose another output.uri, or remove it",
        ) from None
    other = manifest.job
    if other.uid != job.uid:
        what = "checkpoint" if manifest.kind == "checkpoint" else "result"
        raise Failed(
            "OutputOccupied",
            f"output.uri: {place.display} holds the {what} of {other.namespace}/{other.name} (uid {other.uid}), "
            "not this job's; choose another output.uri, or delete what lies there",
        )
    return manifest


def probe(place: Place, job: JobRef) -> None:
    """Shows that the destination can be written, by a tiny object under a name of our own, then removed.

    Raises Failed(OutputNotFound, AccessDenied, …).
    """
    path = f"{FINETUNE_DIR}/.probe-{job.uid}-{job.attempt}"
    place.write(path, b"")
    place.delete((path,))
