"""Elects a leader by a Lease: only its holder reconciles.

The process exits when it loses the Lease (fencing); a separate thread ensures that even if the
event loop hangs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_operator.kube.client import AlreadyExists, ApiError, Conflict, KubeClient, NotFound
from finetune_operator.settings import Identity, LeaderElectionSettings

log = logging.getLogger(__name__)

EXIT_LEASE_LOST = 3


@dataclass(frozen=True)
class Holder:
    """Identifies the holder of the Lease.

    Its text is the Lease's holderIdentity; `pod_ip` is the address to which other replicas
    redirect progress posts.
    """

    pod_name: str
    pod_ip: str

    def __str__(self) -> str:
        return f"{self.pod_name}/{self.pod_ip}"

    @staticmethod
    def parse(text: str) -> Holder | None:
        """Parses a holderIdentity; None if it is empty or of another format."""
        name, slash, ip = text.partition("/")
        return Holder(name, ip) if slash and name and ip else None


class Leadership:
    """Acquires and renews the Lease for one replica.

    `holder` is the holder that was last read; None if there was none.
    """

    def __init__(self, client: KubeClient, settings: LeaderElectionSettings, identity: Identity) -> None:
        self._client = client
        self._settings = settings
        self._namespace = settings.namespace or identity.namespace
        self._identity = Holder(identity.pod_name, identity.pod_ip)
        self._renewed_at = 0.0  # monotonic; 0 while the Lease isn't ours
        # The holder's last renewal, and when we first read it (monotonic).
        self._last_renewal: tuple[str, float] = ("", 0.0)
        self.holder: Holder | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this replica holds the Lease."""
        return self._renewed_at > 0

    async def acquire(self) -> None:
        """Waits until this replica holds the Lease."""
        if not self._settings.enabled:
            self._renewed_at, self.holder = time.monotonic(), self._identity
            return
        log.info("lease requested: lease=%s/%s holder=%s", self._namespace, self._settings.name, self._identity)
        while True:
            if await self._acquire_or_renew():
                break
            await asyncio.sleep(self._settings.retry_seconds)
        log.info("lease acquired: holder=%s", self._identity)
        threading.Thread(target=self._exit_when_lost, name="lease-guard", daemon=True).start()

    async def renew(self) -> None:
        """Renews the Lease forever. Returns if another replica has taken it."""
        if not self._settings.enabled:
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(self._settings.retry_seconds)
            if not await self._acquire_or_renew() and self.holder != self._identity:
                return

    async def release(self) -> None:
        """Releases the Lease, so that another replica needn't wait until it expires."""
        if not self._settings.enabled or not self.is_leader:
            return
        self._renewed_at = 0.0
        try:
            lease = await self._client.get("leases", self._namespace, self._settings.name)
            if lease["spec"].get("holderIdentity") == str(self._identity):
                lease["spec"]["holderIdentity"] = ""
                await self._client.replace("leases", lease)
        except ApiError as error:
            log.warning("lease not released: %s", error)

    async def _acquire_or_renew(self) -> bool:
        """Tries to take or renew the Lease; an error is logged and counts as a failure."""
        try:
            return await self._acquire_or_renew_once()
        except ApiError as error:
            log.warning("lease neither acquired nor renewed: %s", error)
            return False

    async def _acquire_or_renew_once(self) -> bool:
        """Takes or renews the Lease if it is free, ours or expired. Returns whether it is ours."""
        started_at = time.monotonic()
        try:
            lease = await self._client.get("leases", self._namespace, self._settings.name)
        except NotFound:
            return await self._write(self._client.create, self._lease(None), started_at)
        spec = lease["spec"]
        identity = spec.get("holderIdentity") or ""
        self.holder = Holder.parse(identity)
        if identity and identity != str(self._identity) and not self._has_expired(spec):
            return False
        return await self._write(self._client.replace, self._lease(lease), started_at)

    async def _write(self, write: Any, lease: dict[str, Any], started_at: float) -> bool:
        """Writes the Lease. Returns whether it is ours; not if another replica was faster."""
        try:
            await write("leases", lease)
        except (AlreadyExists, Conflict):
            return False
        self._renewed_at, self.holder = started_at, self._identity
        return True

    def _has_expired(self, spec: dict[str, Any]) -> bool:
        """Whether the holder hasn't renewed the Lease for its duration.

        That is measured by our own clock, from when we first read its last renewal, since the
        clocks of machines differ.
        """
        renewal = f"{spec.get('holderIdentity')} {spec.get('renewTime')}"
        if self._last_renewal[0] != renewal:
            self._last_renewal = (renewal, time.monotonic())
            return False
        return time.monotonic() - self._last_renewal[1] > float(spec.get("leaseDurationSeconds") or 0)

    def _lease(self, before: dict[str, Any] | None) -> dict[str, Any]:
        """Returns the Lease with this replica as its holder, renewed now."""
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = before["spec"] if before else {}
        ours = spec.get("holderIdentity") == str(self._identity)
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": before["metadata"] if before else {"name": self._settings.name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": str(self._identity),
                "leaseDurationSeconds": self._settings.lease_seconds,
                "acquireTime": spec.get("acquireTime") if ours else now,
                "renewTime": now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if ours or not before else 1),
            },
        }

    def _exit_when_lost(self) -> None:
        """Exits if the Lease may be lost, since it wasn't renewed; runs in its own thread."""
        while self.is_leader:
            if time.monotonic() - self._renewed_at > self._settings.renew_seconds:
                log.error("lease lost: it could not be renewed for %d s; exiting", self._settings.renew_seconds)
                os._exit(EXIT_LEASE_LOST)
            time.sleep(0.2)
