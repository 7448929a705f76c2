"""Takes the progress that a supervisor on this machine posts: the operator's protocol, on a loopback port.

Used by `run`. Keeps the last value only.
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

from finetune_api.names import PROGRESS_PATH
from finetune_api.progress import MAX_BODY_BYTES, Progress
from finetune_api.run import ProgressConfig


class Receiver:
    """A context manager; `latest` is what was posted last, or None."""

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

    def _take(self, authorization: str, body: bytes) -> HTTPStatus:
        if not secrets.compare_digest(authorization.encode(), f"Bearer {self._token}".encode()):
            return HTTPStatus.UNAUTHORIZED
        try:
            self.latest = Progress.model_validate_json(body)
        except ValidationError:
            return HTTPStatus.BAD_REQUEST
        return HTTPStatus.OK

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = min(int(self.headers.get("Content-Length") or 0), MAX_BODY_BYTES)
                status = take(self.headers.get("Authorization") or "", self.rfile.read(size))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                return

        return Handler
