"""HTTP proxies in front of real object stores: one refuses writes for a while, as a store does that
lost its permissions or its quota, and one loses the answer to a write."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Refusal:
    """What a store answers to a write."""

    status: int
    code: str
    message: str

    @property
    def body(self) -> bytes:
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{self.code}</Code>'
            f"<Message>{self.message}</Message></Error>"
        ).encode()


DENIED = Refusal(403, "AccessDenied", "User is not authorized to perform: s3:PutObject")
FULL = Refusal(400, "QuotaExceeded", "The bucket quota of 10 GiB is reached")


class StoreProxy:
    """Passes requests on to `target` (a URL). While `refusal` is set, writes get that answer.

    Each request takes `delay` seconds more than the server needs.
    """

    def __init__(self, target: str, delay: float = 0.0) -> None:
        self.refusal: Refusal | None = None
        self.refused = 0
        parts, proxy = urlsplit(target), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(delay)
                if proxy.refusal is not None and self.command != "GET" and self.command != "HEAD":
                    proxy.refused += 1
                    self._answer(proxy.refusal.status, {"Content-Type": "application/xml"}, proxy.refusal.body)
                    return
                connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
                try:
                    connection.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
                    response = connection.getresponse()
                    self._answer(response.status, dict(response.getheaders()), response.read())
                finally:
                    connection.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                size = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", size)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class LostAnswer:
    """Passes requests on to `target` (a URL), and loses the answer to the first PUT, whose effect
    remains: the connection is closed, or `status` is answered instead."""

    def __init__(self, target: str, status: int | None) -> None:
        self.lost = 0
        parts, proxy = urlsplit(target), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
                connection.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
                response = connection.getresponse()
                headers, content = response.getheaders(), response.read()
                connection.close()
                code = response.status
                if self.command == "PUT" and not proxy.lost:
                    proxy.lost += 1
                    if status is None:
                        self.close_connection = True
                        return
                    code, content = status, b""
                self.send_response(code)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                size = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", size)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

            def log_message(self, format: str, *arguments: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
