"""Computes what tells pods that were made from another spec, or other settings, from current ones.

It does no I/O.
"""

from __future__ import annotations

import hashlib
import json

from finetune_api.resource import FineTuneJob
from finetune_operator.core.plan import trainer_image
from finetune_operator.settings import Settings


class PodsDigests:
    """Computes the digest of each job once per generation."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._digests: dict[str, tuple[int, str]] = {}  # by uid of the job, with its generation

    def of(self, job: FineTuneJob) -> str:
        """Returns the digest of what pods of the job would be made from now."""
        meta = job.metadata
        generation, digest = self._digests.get(meta.uid, (-1, ""))
        if generation != meta.generation:
            digest = pods_digest(job, self._settings)
            self._digests[meta.uid] = (meta.generation, digest)
        return digest

    def forget(self, uid: str) -> None:
        """Removes the digest of a job that is gone."""
        self._digests.pop(uid, None)


def pods_digest(job: FineTuneJob, settings: Settings) -> str:
    """Returns the digests of the spec and of the settings that shape the pods of a job, with a dot
    between them.

    Fields at their defaults are left out, so that a version with more fields computes the same.
    """
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    policy = spec.pop("runPolicy", {})
    spec.get("output", {}).pop("deletionPolicy", None)  # it doesn't concern pods that train
    chart = {
        "image": trainer_image(job, settings),
        "pullPolicy": settings.image_pull_policy,
        "pods": settings.pods.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "storage": settings.storage.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "models": settings.models.model_dump(mode="json", by_alias=True, exclude_defaults=True),
    }
    return f"{_digest({'spec': spec, 'stallSeconds': policy.get('stallSeconds')})}.{_digest(chart)}"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
