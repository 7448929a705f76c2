"""A small model hub on a loopback port, for tests: the real `huggingface_hub` uses it through
HF_ENDPOINT.

It serves local folders as repositories of models and, under names that begin with `datasets/`, of
data sets: info, tree, HEAD and GET of files with ETag, X-Repo-Commit and ranges, and the hub's own
error codes. It never writes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ID = r"(?P<id>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|datasets)"
INFO = re.compile(rf"^/api/{KIND}/{ID}(?:/revision/(?P<revision>[^/]+))?$")
TREE = re.compile(rf"^/api/{KIND}/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?$")
FILE = re.compile(rf"^/(?:(?P<kind>datasets)/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
RANGE = re.compile(r"^bytes=(?P<first>\d+)-(?P<last>\d*)$")
CHUNK = 1 << 20


@dataclass(frozen=True)
class Repository:
    """A folder served as one model. With `token`, only requests with that token may read; if
    `gated`, requests with another token get 403 instead of 401. `revisions` are names of the one
    commit."""

    folder: Path
    token: str | None = None
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)

    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(path for path in self.folder.rglob("*") if path.is_file()))

    def path_of(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def commit(self) -> str:
        """Forty hex digits from names and contents: the same folder has the same commit."""
        digest = hashlib.sha1(usedforsecurity=False)
        for file in self.files():
            digest.update(f"{self.path_of(file)}\0{etag(file)}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Refusal:
    """An error that the hub answers: status, X-Error-Code, and a sentence."""

    status: HTTPStatus
    code: str
    message: str


@dataclass
class Hub:
    """A running hub. `requests` gets "METHOD path" for each request; `endpoint` is the value for
    HF_ENDPOINT.

    `break_after` cuts every file's body after that many bytes, once per file, so that a client must
    resume.
    """

    endpoint: str
    repositories: Mapping[str, Repository]
    break_after: int = 0
    requests: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def environment(self, home: Path) -> dict[str, str]:
        """Return variables for a child process: this hub, and a separate home for the cache and the
        token."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


_etags: dict[tuple[str, int, int], str] = {}


def etag(file: Path) -> str:
    """Return the SHA-256 of the content, cached by size and modification time."""
    stat = file.stat()
    key = (str(file), stat.st_size, stat.st_mtime_ns)
    if key not in _etags:
        with file.open("rb") as stream:
            _etags[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _etags[key]


@contextmanager
def running_hub(repositories: Mapping[str, Repository], break_after: int = 0, host: str = "127.0.0.1") -> Iterator[Hub]:
    """Serve until the block ends, on a free port of this machine's address `host`.

    >>> with running_hub({"org/tiny": Repository(folder)}) as hub:
    ...     snapshot_download("org/tiny", endpoint=hub.endpoint, cache_dir=tmp)
    """
    hub = Hub(endpoint="", repositories=repositories, break_after=break_after)
    server = ThreadingHTTPServer((host, 0), _handler(hub))
    server.daemon_threads = True
    hub.endpoint = f"http://{host}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: `hub.requests` is the log."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        for pattern, answer in ((INFO, self._info), (TREE, self._tree), (FILE, self._file)):
            if match := pattern.match(path):
                query = {key: unquote(value) for key, value in match.groupdict().items() if value}
                prefix = "datasets/" if query.get("kind") == "datasets" else ""
                repository = self._repository(prefix + query["id"], query.get("revision", "main"))
                if isinstance(repository, Refusal):
                    self._refuse(repository)
                else:
                    answer(repository, query)
                return
        self._refuse(Refusal(HTTPStatus.NOT_FOUND, "RepoNotFound", f"no such page: {path}"))

    def _repository(self, name: str, revision: str) -> Repository | Refusal:
        repository = self.hub.repositories.get(name)
        if repository is None:  # the hub answers 401 for what does not exist, so that names don't leak
            return Refusal(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        sent = self.headers.get("Authorization", "")
        if repository.token and sent != f"Bearer {repository.token}":
            if repository.gated and sent:
                return Refusal(HTTPStatus.FORBIDDEN, "GatedRepo", f"Access to model {name} is restricted")
            if repository.gated:
                return Refusal(HTTPStatus.UNAUTHORIZED, "GatedRepo", f"Access to model {name} is restricted")
            return Refusal(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        if revision not in (*repository.revisions, repository.commit()):
            return Refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository

    def _info(self, repository: Repository, query: dict[str, str]) -> None:
        siblings = [{"rfilename": repository.path_of(file), "size": file.stat().st_size} for file in repository.files()]
        self._json(
            repository,
            {
                "_id": repository.commit()[:24],
                "id": query["id"],
                "modelId": query["id"],
                "sha": repository.commit(),
                "private": bool(repository.token),
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
                "createdAt": "2024-01-01T00:00:00.000Z",
                "lastModified": "2024-01-01T00:00:00.000Z",
            },
        )

    def _tree(self, repository: Repository, query: dict[str, str]) -> None:
        prefix = query.get("path", "")
        entries = [
            {"type": "file", "path": path, "size": file.stat().st_size, "oid": etag(file)[:40]}
            for file in repository.files()
            if (path := repository.path_of(file)).startswith(f"{prefix}/" if prefix else "")
        ]
        self._json(repository, entries)

    def _file(self, repository: Repository, query: dict[str, str]) -> None:
        file = repository.folder / query["path"]
        if file not in repository.files():
            refusal = Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", f"Entry not found: {query['path']}")
            self._refuse(refusal, commit=repository.commit())
            return
        size = file.stat().st_size
        asked_range = RANGE.match(self.headers.get("Range", ""))
        first = int(asked_range["first"]) if asked_range else 0
        last = min(int(asked_range["last"]), size - 1) if asked_range and asked_range["last"] else size - 1
        if asked_range and first >= size:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked_range else HTTPStatus.OK)
        if asked_range:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", f'"{etag(file)}"')
        self.send_header("X-Repo-Commit", repository.commit())
        self.end_headers()
        if self.command == "GET":
            self._body(file, first, last, query["path"])

    def _body(self, file: Path, first: int, last: int, path: str) -> None:
        limit = self.hub.break_after
        cut = limit if limit and path not in self.hub.broken else None
        with file.open("rb") as stream:
            stream.seek(first)
            left = last - first + 1
            if cut is not None and cut < left:
                self.hub.broken.add(path)
                self.wfile.write(stream.read(cut))
                self.close_connection = True
                return
            while left > 0:
                chunk = stream.read(min(CHUNK, left))
                self.wfile.write(chunk)
                left -= len(chunk)

    def _json(self, repository: Repository, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", repository.commit())
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, refusal: Refusal, commit: str | None = None) -> None:
        body = json.dumps({"error": refusal.message}).encode()
        self.send_response(refusal.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Error-Code", refusal.code)
        self.send_header("X-Error-Message", refusal.message)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
