"""Sends the few requests that the tools need to the cluster's API server.

It authenticates with the admin certificate.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class ApiError(Exception):
    """A request failed. `status` is the HTTP status, or 0 if the API server is unreachable."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Api:
    """A client of the API server at `server`, with the certificates in the folder `pki`."""

    server: str
    pki: Path

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def request(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        """Returns the decoded response, as text if it isn't JSON. Raises ApiError."""
        address = urlsplit(self.server)
        connection = http.client.HTTPSConnection(address.hostname or "", address.port, timeout=10, context=self._tls())
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": content})
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"{method} {self.server}{path}: {error}") from error
        finally:
            connection.close()
        if response.status >= 300:
            raise ApiError(response.status, f"{method} {path}: {response.status} {text[:300]}")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def lines(self, path: str, timeout: float) -> Iterator[bytes]:
        """Yields the lines of a streaming response, such as a watch, until the server ends it.

        Raises ApiError.
        """
        address = urlsplit(self.server)
        connection = http.client.HTTPSConnection(
            address.hostname or "", address.port, timeout=timeout, context=self._tls()
        )
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status >= 300:
                raise ApiError(response.status, f"GET {path}: {response.status} {response.read()[:300]!r}")
            while line := response.readline():
                yield line
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"GET {self.server}{path}: {error}") from error
        finally:
            connection.close()

    def answers(self, path: str) -> bool:
        """Whether a GET of `path` succeeds."""
        try:
            self.get(path)
        except ApiError:
            return False
        return True

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        context.load_cert_chain(self.pki / "admin.crt", self.pki / "admin.key")
        return context


def http_ok(url: str) -> bool:
    """Whether a plain HTTP address responds with anything except a server error."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=2)
    try:
        connection.request("GET", address.path or "/")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
