"""Connects to the operator, which a pod recognizes by a certificate of the operator's authority."""

from __future__ import annotations

import http.client
import socket
import ssl
from urllib.parse import SplitResult

from finetune_api.messages.run import ProgressConfig


def connection(config: ProgressConfig, parts: SplitResult, timeout: float) -> http.client.HTTPConnection:
    """Returns a connection to the host of a URL, which isn't open yet; `timeout` is in seconds.

    A redirect leads to the address of a replica, whose certificate has the operator's name. With an
    authority, a URL without TLS is an error. Raises ValueError.
    """
    if parts.hostname is None:
        raise ValueError(f"{parts.geturl()!r} is not a URL")
    if not config.authority:
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=timeout)
    if parts.scheme != "https":
        raise ValueError(f"{parts.geturl()!r} isn't encrypted, but the operator has a certificate")
    return _Verified(parts.hostname, parts.port, config, timeout)


class _Verified(http.client.HTTPSConnection):
    """Verifies the server by an authority and a name, whatever its address is."""

    def __init__(self, host: str, port: int | None, config: ProgressConfig, timeout: float) -> None:
        self._verifying = ssl.create_default_context(cadata=config.authority)
        self._name = config.server_name or host
        super().__init__(host, port, timeout=timeout, context=self._verifying)

    def connect(self) -> None:
        """Connects and makes the TLS handshake."""
        plain = socket.create_connection((self.host, self.port), self.timeout)
        try:
            self.sock = self._verifying.wrap_socket(plain, server_hostname=self._name)
        except BaseException:
            plain.close()
            raise
