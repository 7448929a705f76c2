"""Keeps what this pod has stored in the destination, what it couldn't store, and whose signature
that has. It writes nothing itself except to give an empty destination back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.messages.manifest import Manifest
from finetune_api.messages.run import JobRef, RunConfig
from finetune_api.status import ArtifactStatus, CheckpointStatus
from finetune_trainer.destination import predecessor
from finetune_trainer.destination.health import StoreHealth
from finetune_trainer.destination.signing import EVERYTHING, Signer, Trust
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.manifest import now_rfc3339
from finetune_trainer.reporting.progress import Stored
from finetune_trainer.storage.base import Storage

MENDABLE = frozenset({"StorageUnavailable", "AccessDenied", "CredentialsMissing", "DiskFull", "OutputNotFound"})
"""Reasons for which an upload is tried again: a person may correct the storage meanwhile."""


_RECIPE = {"model", "data", "method", "lora", "full", "training"}  # of a RunConfig


@dataclass(frozen=True)
class Writer:
    """Identifies the job that writes, and signs its manifests.

    `provenance` is what a checkpoint says of its model and configuration, so that another job can
    start from it.
    """

    job: JobRef
    sign: Callable[[Manifest], Manifest] = lambda manifest: manifest
    provenance: Mapping[str, Any] = field(default_factory=dict)


class Deposit:
    """Is changed by the threads that upload, and read by the one that reports.

    A pod that `leads` signs what it stores, if an operator vouches for its key.
    """

    def __init__(self, run: RunConfig, *, leads: bool) -> None:
        self._run = run
        self._leads = leads
        self._signer = Signer() if leads and run.signers is not None else None
        self._health = StoreHealth()
        self.checkpoint: CheckpointStatus | None = None
        self.artifact: ArtifactStatus | None = None
        self.base: Mapping[str, Any] = {}
        """The base model: its location and, once its weights are there, the digest of its files."""
        self.loss: RunError | None = None
        """Set if another job has taken over the destination."""

    @property
    def public_key(self) -> str | None:
        """The key by which others verify what this pod stores; None if it signs nothing."""
        return self._signer.public if self._signer else None

    @property
    def writer(self) -> Writer:
        """By whom manifests are written."""
        configuration = self._run.model_dump(mode="json", by_alias=True, exclude_none=True, include=_RECIPE)
        provenance = {"model": self.base, "configuration": configuration}
        if self._signer is None:
            return Writer(self._run.job, provenance=provenance)
        return Writer(self._run.job, self._signer.sign, provenance)

    def trust(self, later: Callable[[], tuple[str, ...]], *, result: bool) -> Trust:
        """Returns which manifests count; `later` asks the operator for the keys that it knows.

        A pod that doesn't lead has no operator to ask, and at the first attempt can't know the key
        of node 0, which may just have taken over a predecessor's checkpoints.
        """
        signers, own = self._run.signers, self.public_key
        if signers is None:
            return EVERYTHING
        restarted = self._run.job.attempt > 1
        if not self._leads:
            return Trust(signers, unrecorded=restarted or not result)
        return Trust(signers, lambda: tuple(key for key in later() if key != own), unrecorded=restarted)

    def report(self, step: int) -> Stored:
        """Returns what is reported after optimizer step `step`."""
        return Stored(self.checkpoint, self._health.report(step), self.artifact, self.public_key)

    def add_checkpoint(self, status: CheckpointStatus) -> None:
        """Records a checkpoint that is complete in the destination."""
        self.checkpoint, self._health = status, self._health.stored(status.step)

    def add_result(self, artifact: ArtifactStatus, step: int) -> None:
        """Records the result, which is complete in the destination."""
        self.artifact, self._health = artifact, self._health.stored(step)

    def add_failure(self, error: RunError, *, is_lost: bool) -> None:
        """Records a try to store a checkpoint that failed; `is_lost` if there is no other one."""
        if error.reason == "OutputOccupied":
            self.loss = error
        elif not is_lost or error.reason not in MENDABLE:  # else it has been recorded as a try
            self._health = self._health.failed(error, now_rfc3339(), "training continues")

    def hold(self, error: RunError, consequence: str) -> None:
        """Records that the result can't be stored now, and what that means."""
        self._health = self._health.failed(error, now_rfc3339(), consequence)

    def release_if_empty(self, storage: Storage | None, log: Log) -> None:
        """Gives the destination back if this job has stored nothing there."""
        if storage is None or not self._leads or self.checkpoint is not None:
            return
        try:
            predecessor.release_if_empty(storage, self._run.job)
        except RunError as error:
            log.warning("can't release the output", reason=error.reason, detail=error.message)
