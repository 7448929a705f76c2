"""leader: only the holder of a Lease works. Called by the door, which starts everything else once the Lease is held.

Losing the Lease ends the process (fencing): a thread of its own does so even when the event loop hangs. Never decides
anything about jobs.
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

from finetune_operator.cluster import AlreadyExists, ApiError, Cluster, Conflict, NotFound
from finetune_operator.settings import Identity, LeaderElectionSettings

log = logging.getLogger(__name__)

EXIT_LEASE_LOST = 3


@dataclass(frozen=True)
class Holder:
    """Who holds the Lease; carried in holderIdentity, so that a replica can send a caller on to the leader."""

    pod_name: str
    pod_ip: str

    def __str__(self) -> str:
        return f"{self.pod_name}/{self.pod_ip}"

    @staticmethod
    def parse(text: str) -> Holder | None:
        name, slash, ip = text.partition("/")
        return Holder(name, ip) if slash and name and ip else None


class Leadership:
    """The Lease, seen from one replica. `holder` is whoever held it when it was last read."""

    def __init__(self, cluster: Cluster, settings: LeaderElectionSettings, identity: Identity) -> None:
        self._cluster = cluster
        self._settings = settings
        self._namespace = settings.namespace or identity.namespace
        self._me = Holder(identity.pod_name, identity.pod_ip)
        self._renewed = 0.0  # monotonic; 0 while the Lease isn't ours
        self._seen: tuple[str, float] = ("", 0.0)  # what the holder last wrote, and when we first saw that
        self.holder: Holder | None = None

    @property
    def is_leader(self) -> bool:
        return self._renewed > 0

    async def acquire(self) -> None:
        """Returns once the Lease is ours."""
        if not self._settings.enabled:
            self._renewed, self.holder = time.monotonic(), self._me
            return
        log.info("waiting for the lease %s/%s as %s", self._namespace, self._settings.name, self._me)
        while True:
            if await self._take():
                break
            await asyncio.sleep(self._settings.retry_seconds)
        log.info("leading as %s", self._me)
        threading.Thread(target=self._end_when_lost, name="lease-guard", daemon=True).start()

    async def keep(self) -> None:
        """Renews for ever. Returns when somebody else took the Lease."""
        if not self._settings.enabled:
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(self._settings.retry_seconds)
            if not await self._take() and self.holder != self._me:
                return

    async def release(self) -> None:
        """So that another replica need not wait for the Lease to run out."""
        if not self._settings.enabled or not self.is_leader:
            return
        self._renewed = 0.0
        try:
            lease = await self._cluster.get("leases", self._namespace, self._settings.name)
            if lease["spec"].get("holderIdentity") == str(self._me):
                lease["spec"]["holderIdentity"] = ""
                await self._cluster.replace("leases", lease)
        except ApiError as error:
            log.warning("lease not released: %s", error)

    async def _take(self) -> bool:
        """As _try_to_take; an API server that doesn't answer is asked again."""
        try:
            return await self._try_to_take()
        except ApiError as error:
            log.warning("lease neither taken nor renewed: %s", error)
            return False

    async def _try_to_take(self) -> bool:
        """Takes or renews the Lease where it is free, ours or expired."""
        started = time.monotonic()
        try:
            lease = await self._cluster.get("leases", self._namespace, self._settings.name)
        except NotFound:
            return await self._write(self._cluster.create, self._lease(None), started)
        spec = lease["spec"]
        identity = spec.get("holderIdentity") or ""
        self.holder = Holder.parse(identity)
        if identity and identity != str(self._me) and not self._has_expired(spec):
            return False
        return await self._write(self._cluster.replace, self._lease(lease), started)

    async def _write(self, write: Any, lease: dict[str, Any], started: float) -> bool:
        try:
            await write("leases", lease)
        except (AlreadyExists, Conflict):
            return False
        self._renewed, self.holder = started, self._me
        return True

    def _has_expired(self, spec: dict[str, Any]) -> bool:
        """By our own clock, from when we first saw the holder's last sign: clocks of machines differ."""
        sign = f"{spec.get('holderIdentity')} {spec.get('renewTime')}"
        if self._seen[0] != sign:
            self._seen = (sign, time.monotonic())
            return False
        return time.monotonic() - self._seen[1] > float(spec.get("leaseDurationSeconds") or 0)

    def _lease(self, before: dict[str, Any] | None) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = before["spec"] if before else {}
        ours = spec.get("holderIdentity") == str(self._me)
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": before["metadata"] if before else {"name": self._settings.name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": str(self._me),
                "leaseDurationSeconds": self._settings.lease_seconds,
                "acquireTime": spec.get("acquireTime") if ours else now,
                "renewTime": now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if ours or not before else 1),
            },
        }

    def _end_when_lost(self) -> None:
        """Runs beside the event loop, which may hang: nobody acts on a Lease that may be another's by now."""
        while self.is_leader:
            if time.monotonic() - self._renewed > self._settings.renew_seconds:
                log.error("the lease could not be renewed for %d s; ending", self._settings.renew_seconds)
                os._exit(EXIT_LEASE_LOST)
            time.sleep(0.2)
