"""A few requests to the cluster's API server with the admin certificate. Called by bringup and status."""

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
    """The API server is not there, or said no; `status` is 0 when it is not there."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Api:
    server: str
    pki: Path

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def request(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        """The decoded answer (text if it isn't JSON); raises ApiError."""
        where = urlsplit(self.server)
        connection = http.client.HTTPSConnection(where.hostname or "", where.port, timeout=10, context=self._tls())
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": content})
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"{method} {self.server}{path}: {error}") from error
        finally:
            connection.close()
        if answer.status >= 300:
            raise ApiError(answer.status, f"{method} {path}: {answer.status} {text[:300]}")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def lines(self, path: str, timeout: float) -> Iterator[bytes]:
        """The lines of an answer that goes on, such as a watch; raises ApiError, ends when the server ends it."""
        where = urlsplit(self.server)
        connection = http.client.HTTPSConnection(where.hostname or "", where.port, timeout=timeout, context=self._tls())
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.status >= 300:
                raise ApiError(answer.status, f"GET {path}: {answer.status} {answer.read()[:300]!r}")
            while line := answer.readline():
                yield line
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"GET {self.server}{path}: {error}") from error
        finally:
            connection.close()

    def answers(self, path: str) -> bool:
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
    """Whether a plain-http address answers anything but a server error."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=2)
    try:
        connection.request("GET", where.path or "/")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
