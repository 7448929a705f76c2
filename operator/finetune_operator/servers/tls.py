"""Reads the certificate by which training pods recognize the operator, again whenever it changes.

The chart's Secret, or cert-manager's, is mounted by the kubelet, which also replaces its files. The
operator itself reads no Secret.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

_CERTIFICATE, _KEY = "tls.crt", "tls.key"


class Certificate:
    """Holds the certificate and the key of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._version = self._files()
        self._current = self._load()

    def context(self) -> ssl.SSLContext:
        """Returns a context for servers whose handshakes use the newest certificate."""
        context = self._load()
        context.sni_callback = self._choose
        return context

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        """Gives a handshake the newest certificate that could be read."""
        version = self._files()
        if version != self._version:
            self._version = version
            try:
                self._current = self._load()
                log.info("certificate read: folder=%s", self._folder)
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                log.error("the new certificate can't be read, so the last one is used: %s", error)
        connection.context = self._current

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._folder / _CERTIFICATE, self._folder / _KEY)
        return context

    def _files(self) -> tuple[int, ...]:
        files = (self._folder / _CERTIFICATE, self._folder / _KEY)
        return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)
