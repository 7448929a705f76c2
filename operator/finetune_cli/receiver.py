"""Receives the progress that a supervisor on this machine posts.

It speaks the operator's protocol on a loopback port and stores only the latest value.
"""

from __future__ import annotations

import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from finetune_api.messages.progress import MAX_BODY_BYTES, Progress
from finetune_api.messages.run import ProgressConfig
from finetune_api.names import PROGRESS_PATH


class Receiver:
    """Runs the HTTP server; it is a context manager.

    `latest` is the latest progress, or None. `config` has the URL for the supervisor, which posts
    every `interval` seconds. The token is in `token_file` while the server runs.
    """

    def __init__(self, token_file: Path, interval: float = 0.3) -> None:
        self.latest: Progress | None = None
        self._token = secrets.token_urlsafe(24)
        self._token_file = token_file
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.config = ProgressConfig(
            url=f"http://127.0.0.1:{self._server.server_address[1]}{PROGRESS_PATH}",
            token_path=str(token_file),
            interval_seconds=interval,
        )

    def __enter__(self) -> Self:
        self._token_file.parent.mkdir(parents=True, exist_ok=True)
        self._token_file.touch(mode=0o600)
        self._token_file.write_text(self._token)
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._token_file.unlink(missing_ok=True)

    def _receive(self, authorization: str, body: bytes) -> HTTPStatus:
        if not secrets.compare_digest(authorization.encode(), f"Bearer {self._token}".encode()):
            return HTTPStatus.UNAUTHORIZED
        try:
            self.latest = Progress.model_validate_json(body)
        except ValidationError:
            return HTTPStatus.BAD_REQUEST
        return HTTPStatus.OK

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receive = self._receive

        class Handler(BaseHTTPRequestHandler):
            """Handles the posts of the supervisor."""

            def do_POST(self) -> None:
                """Responds to a post of progress."""
                size = min(int(self.headers.get("Content-Length") or 0), MAX_BODY_BYTES)
                status = receive(self.headers.get("Authorization") or "", self.rfile.read(size))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Logs nothing: the terminal is for the progress bar."""

        return Handler
