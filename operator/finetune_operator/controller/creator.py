"""Creates children of FineTuneJobs, and first looks up what must be true before that.

It decides nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.messages.run import RunConfig
from finetune_operator.controller import ownership
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.deletion.rivals import rivals
from finetune_operator.core.actions import Blocked, NameTaken, OutOfDate, SpecRefused
from finetune_operator.core.objects import Observed
from finetune_operator.core.pods import offers
from finetune_operator.core.pods.network_policy import network_policy
from finetune_operator.kube.client import AlreadyExists, KubeClient, NotFound, Refused, Unavailable
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

_REFUSED_FOR_NOW = (401, 403, 408)
# What the API server says if a webhook or a policy of the administrator refuses an object, whatever
# the code is that they have chosen; and if a webhook doesn't answer.
_DENIALS = ("admission webhook", "ValidatingAdmissionPolicy", "MutatingAdmissionPolicy")
_FAILED_WEBHOOK = "failed calling webhook"


class Creator:
    """Creates the children of all jobs."""

    def __init__(self, client: KubeClient, cache: Cache, settings: Settings) -> None:
        self._client = client
        self._cache = cache
        self._settings = settings

    async def check_offered(self, observed: Observed) -> None:
        """Checks that the job may name what it names. Raises core.plan.NotOffered."""
        offers.check_offered(observed.job, self._settings)
        for entry in offers.unlisted(observed.job, self._settings):
            existing: Mapping[str, Any] | None = None
            with contextlib.suppress(NotFound):
                existing = await self._client.get(entry.resource, observed.job.metadata.namespace, entry.name)
            if refusal := entry.refusal(existing):
                raise refusal

    def completed(self, run: RunConfig, observed: Observed, now: datetime) -> RunConfig:
        """Returns the RunConfig with what only the controller knows: who else could own the output,
        and the authority of the operator's certificate, as it is now.

        Raises OSError if its file can't be read.
        """
        known = rivals(self._cache, observed.job, self._settings.watch_namespaces, now)
        return self._with_authority(run.model_copy(update={"rivals": known}))

    def _with_authority(self, run: RunConfig) -> RunConfig:
        progress = self._settings.progress
        if run.progress is None or not progress.certificate:
            return run
        update = {
            "authority": Path(progress.certificate, "ca.crt").read_text(encoding="ascii"),
            "server_name": progress.recognized_name,
        }
        return run.model_copy(update={"progress": run.progress.model_copy(update=update)})

    async def close_pods(self, observed: Observed, *, first: bool) -> None:
        """Creates the NetworkPolicy of the job's pods unless it exists.

        `first` says that there are no children yet.
        """
        if not self._settings.network_policies.enabled:
            return
        manifest = network_policy(observed.job, self._settings)
        with contextlib.suppress(OutOfDate):
            if not first and await self._existing("networkpolicies", manifest, observed):
                return
        await self.create("networkpolicies", manifest, observed)

    async def create(self, resource: str, manifest: Mapping[str, Any], observed: Observed) -> None:
        """Creates a child, unless an earlier reconcile has.

        Raises OutOfDate, NameTaken, SpecRefused, Blocked or kube.client.Unavailable.
        """
        meta = manifest["metadata"]
        created: Mapping[str, Any]
        try:
            created = await self._client.create(resource, manifest)
            log.info(
                "created %s %s", manifest["kind"], meta["name"], extra={"job": meta["labels"][names.LABEL_JOB_NAME]}
            )
        except AlreadyExists:
            created = await self._existing(resource, manifest, observed)
        except NotFound as error:
            raise OutOfDate from error
        except Unavailable as error:
            if _FAILED_WEBHOOK in error.message:
                raise Blocked(error.message) from error
            raise
        except Refused as error:
            if error.code in _REFUSED_FOR_NOW or any(text in error.message for text in _DENIALS):
                raise Blocked(error.message) from error
            raise SpecRefused(error.message) from error
        if resource == "jobs":
            self._cache.put_job(created)

    async def _existing(self, resource: str, manifest: Mapping[str, Any], observed: Observed) -> Mapping[str, Any]:
        """Returns the existing object of the same name if it is ours: we crashed after creating it.

        Raises Blocked if it is being deleted, NameTaken if it belongs to another owner.
        """
        meta = manifest["metadata"]
        kind_and_name = f"{manifest['kind']} {meta['name']}"
        try:
            existing = await self._client.get(resource, meta["namespace"], meta["name"])
        except NotFound as error:
            raise OutOfDate from error
        owner = ownership.controller_of(existing)
        if owner.get("uid") == observed.job.metadata.uid:
            if "deletionTimestamp" in existing["metadata"]:
                raise Blocked(f"{kind_and_name} is being deleted; it will be created again when it is gone")
            return existing
        if owner.get("kind") == names.KIND and owner.get("name") == observed.job.metadata.name:
            raise Blocked(
                f"{kind_and_name} of a deleted FineTuneJob of the same name still exists; waiting until it is gone"
            )
        belonging = f"belongs to {owner.get('kind')} {owner.get('name')}" if owner else "has no owner"
        raise NameTaken(
            f"{kind_and_name} already exists and {belonging}; rename the FineTuneJob or delete the {manifest['kind']}"
        )
