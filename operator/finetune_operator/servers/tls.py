"""Has the certificate by which training pods recognize the operator, always a current one.

The kubelet mounts the chart's Secret, or cert-manager's, and also replaces its files; the operator
itself reads no Secret. If the key of the authority is there, certificates are issued in this
process; else the folder has one.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from finetune_operator.servers import authority

log = logging.getLogger(__name__)

_CERTIFICATE, _KEY = "tls.crt", "tls.key"
_FILES = (_CERTIFICATE, _KEY, authority.CERTIFICATE, authority.KEY, authority.FORMER_KEY)


@dataclass(frozen=True)
class Lease:
    """What certificates are issued for, and for how long."""

    server_name: str
    lifetime: timedelta


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Certificate:
    """Holds the newest certificate of a folder, or of its authority."""

    def __init__(self, folder: Path, lease: Lease | None = None, now: Callable[[], datetime] = _utc_now) -> None:
        self._folder = folder
        self._lease = lease
        self._now = now
        self._renewal: datetime | None = None
        self._version = self._files()
        self._current = self._load()

    def context(self) -> ssl.SSLContext:
        """Returns a context for servers whose handshakes use the newest certificate."""
        context = self._load()
        context.sni_callback = self._choose
        return context

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        """Gives a handshake the newest certificate that could be made or read."""
        version = self._files()
        if version != self._version or (self._renewal is not None and self._now() >= self._renewal):
            self._version = version
            try:
                self._current = self._load()
                log.info("certificate renewed: folder=%s until=%s", self._folder, self._renewal or "the next change")
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                log.error("there is no new certificate, so the last one is used: %s", error)
        connection.context = self._current

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        issuer = authority.read(self._folder) if self._lease else None
        if issuer is None or self._lease is None:
            context.load_cert_chain(self._folder / _CERTIFICATE, self._folder / _KEY)
            self._renewal = None
            return context
        issued = issuer.issue(self._lease.server_name, self._lease.lifetime, self._now())
        _load_from_memory(context, issued)
        self._renewal = issued.renewal
        return context

    def _files(self) -> tuple[int, ...]:
        files = (self._folder / name for name in _FILES)
        return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


def _load_from_memory(context: ssl.SSLContext, issued: authority.Issued) -> None:
    """Loads a certificate and its key by a file that no disk has."""
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(issued.chain + issued.key)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
