"""Looks up whether the owners of what a job names allow it, by a label."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from finetune_api.resource import FineTuneJob
from finetune_operator.core.pods import offers
from finetune_operator.kube.client import KubeClient, NotFound
from finetune_operator.settings import Settings


async def check_offered(client: KubeClient, job: FineTuneJob, settings: Settings) -> None:
    """Checks that the job may name what it names. Raises core.plan.NotOffered."""
    offers.check_offered(job, settings)
    for entry in offers.unlisted(job, settings):
        existing: Mapping[str, Any] | None = None
        with contextlib.suppress(NotFound):
            existing = await client.get(entry.resource, job.metadata.namespace, entry.name)
        if refusal := entry.refusal(existing):
            raise refusal
