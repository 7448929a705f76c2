"""A small container registry on a loopback port, for tests that push images: a fake that implements
what clients need of the OCI distribution specification (blobs, in one piece or in chunks, and
manifests)."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass
class Registry:
    """A running registry. `manifests` are by repository and by tag or digest, `blobs` by digest."""

    address: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def running_registry() -> Iterator[Registry]:
    """Serves an empty registry until the block ends."""
    registry = Registry()
    handler = type("Handler", (_Handler,), {"registry": registry})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    registry.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    registry: Registry
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in ("/v2/", "/v2"):
            return self._answer(200)
        if "/blobs/" in path:
            blob = self.registry.blobs.get(path.rpartition("/")[2])
            return self._answer(404) if blob is None else self._answer(200, blob)
        repository, _, reference = path.removeprefix("/v2/").partition("/manifests/")
        stored = self.registry.manifests.get((repository, reference))
        if stored is None:
            return self._answer(404)
        return self._answer(200, stored[1], {"Content-Type": stored[0], "Docker-Content-Digest": _digest(stored[1])})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        identity = str(uuid.uuid4())
        self.registry.uploads[identity] = self._body()
        repository = urlsplit(self.path).path.removeprefix("/v2/").partition("/blobs/")[0]
        self._answer(202, headers={"Location": f"/v2/{repository}/blobs/uploads/{identity}", "Range": "0-0"})

    def do_PATCH(self) -> None:
        path = urlsplit(self.path).path
        identity = path.rpartition("/")[2]
        self.registry.uploads[identity] += self._body()
        size = len(self.registry.uploads[identity])
        self._answer(202, headers={"Location": path, "Range": f"0-{size - 1}"})

    def do_PUT(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        if "/blobs/uploads/" in url.path:
            blob = self.registry.uploads.pop(url.path.rpartition("/")[2]) + body
            (expected,) = parse_qs(url.query)["digest"]
            if _digest(blob) != expected:
                return self._answer(400)
            self.registry.blobs[expected] = blob
            return self._answer(201, headers={"Docker-Content-Digest": expected})
        repository, _, reference = url.path.removeprefix("/v2/").partition("/manifests/")
        for name in (reference, _digest(body)):
            self.registry.manifests[repository, name] = (self.headers["Content-Type"], body)
        return self._answer(201, headers={"Docker-Content-Digest": _digest(body)})

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
