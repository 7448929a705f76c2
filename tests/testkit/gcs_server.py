"""A server of Google Cloud Storage on a loopback port: fake-gcs-server, behind a front with the
parts of the XML API that obstore uses and that server lacks.

The front checks tokens as Google does: a service account's are signed with its key, and the
metadata server's are those of the pod's identity. fake-gcs-server stores, lists and compares
generations.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from obstore.store import GCSStore

from testkit import programs

EMAIL = "trainer@project.iam.gserviceaccount.com"
_BOUNDARY = b"2f7c0e5d1b7e4a0f9a6d"
_TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"


@dataclass
class Gcs:
    """A running server. `identity` is the token that the metadata server gives, if any."""

    endpoint: str
    folder: Path
    backend: str
    identity: str | None = None
    tokens: dict[str, float] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """The JSON key of a service account, as Google's console gives it."""
        private = (self.folder / "key.pem").read_text()
        return json.dumps({
            "type": "service_account", "project_id": "project", "private_key_id": "1", "private_key": private,
            "client_email": EMAIL, "token_uri": "https://oauth2.googleapis.com/token",
        })  # fmt: skip

    def create_bucket(self, name: str) -> None:
        self.request("POST", "/storage/v1/b?project=project", json.dumps({"name": name}).encode())

    def store(self, bucket: str) -> GCSStore:
        """Return an obstore client of that bucket."""
        options = {"allow_http": True}
        return GCSStore(bucket, base_url=self.endpoint, service_account_key=self.key, client_options=options)

    def environment(self) -> dict[str, str]:
        """Return what a Secret named by `credentialsRef` contains for this server."""
        return {"GOOGLE_APPLICATION_CREDENTIALS": self.key, "GOOGLE_BASE_URL": self.endpoint}

    def accepts(self, header: str) -> bool:
        """Whether a request's Authorization has a valid token; a signature is checked once."""
        token = header.removeprefix("Bearer ")
        if token and token == self.identity:
            return True
        if token not in self.tokens:
            self.tokens[token] = _expiry(token, self.folder)
        return self.tokens[token] > time.time()

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers (in lowercase) and body of fake-gcs-server's response."""
        connection = http.client.HTTPConnection(urlsplit(self.backend).netloc, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
        finally:
            connection.close()


def _expiry(token: str, folder: Path) -> float:
    """Return when a service account's token ends, 0 if its key hasn't signed it."""
    head, _, signature = token.rpartition(".")
    try:
        claims = json.loads(_decoded(head.split(".")[1]))
        with tempfile.NamedTemporaryFile() as file:
            file.write(_decoded(signature))
            file.flush()
            command = ["openssl", "dgst", "-sha256", "-verify", str(folder / "public.pem"), "-signature", file.name]
            done = subprocess.run(command, input=head.encode(), capture_output=True, check=False)
    except (ValueError, IndexError):
        return 0.0
    return float(claims["exp"]) if done.returncode == 0 and claims.get("iss") == EMAIL else 0.0


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class _Front(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gcs: ClassVar[Gcs]

    def log_message(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = url.path.removeprefix("/").partition("/")
        if url.path == _TOKEN_PATH:
            self._identity()
        elif not self.gcs.accepts(self.headers.get("Authorization", "")):
            self._refuse(401, "AuthenticationRequired", "Authentication required.")
        elif self.gcs.request("GET", f"/storage/v1/b/{bucket}")[0] != 200:
            self._refuse(404, "NoSuchBucket", "The specified bucket does not exist.")
        elif not key:
            self._list(bucket, query)
        elif self.command in ("GET", "HEAD"):
            self._download(bucket, key)
        elif self.command == "DELETE" and "uploadId" not in query:
            status, _, _ = self.gcs.request("DELETE", f"/storage/v1/b/{bucket}/o/{key}")
            self._refuse(404, "NoSuchKey", "No such object.") if status == 404 else self._send(204, b"")
        elif "uploads" in query or "uploadId" in query:
            self._multipart(bucket, key, query, body)
        else:
            self._upload(bucket, key, body)

    def _identity(self) -> None:
        if self.headers.get("Metadata-Flavor") != "Google" or self.gcs.identity is None:
            self._send(404, b"no service account")
        else:
            token = {"access_token": self.gcs.identity, "expires_in": 3600, "token_type": "Bearer"}
            self._send(200, json.dumps(token).encode())

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        parameters = {"prefix": query.get("prefix", ""), "maxResults": query.get("max-keys", "1000")}
        if "continuation-token" in query:
            parameters["pageToken"] = query["continuation-token"]
        _, _, data = self.gcs.request("GET", f"/storage/v1/b/{bucket}/o?{urlencode(parameters)}")
        page = json.loads(data)
        contents = "".join(
            f"<Contents><Key>{escape(item['name'])}</Key><Size>{item['size']}</Size>"
            f"<LastModified>{item['updated']}</LastModified><ETag>&quot;{item['etag']}&quot;</ETag></Contents>"
            for item in page.get("items", ())
        )
        token = page.get("nextPageToken", "")
        more = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
        self._send(200, f"<ListBucketResult>{contents}{more}</ListBucketResult>".encode())

    def _download(self, bucket: str, key: str) -> None:
        headers = {name: self.headers[name] for name in ("Range",) if self.headers.get(name)}
        path = f"/download/storage/v1/b/{bucket}/o/{key}"
        status, received, data = self.gcs.request(self.command, path, headers=headers)
        if status == 404:
            self._refuse(404, "NoSuchKey", "The specified key does not exist.")
        elif self.headers.get("If-Match") not in (None, received.get("etag")):
            self._refuse(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
        else:
            names = ("etag", "x-goog-generation", "last-modified", "content-range", "content-length")
            self._send(status, data, {name: received[name] for name in names if name in received})

    def _upload(self, bucket: str, key: str, body: bytes) -> None:
        status, data = self._store(bucket, key, body, self.headers.get("x-goog-if-generation-match"))
        if status == 412:
            self._refuse(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
            return
        stored = json.loads(data)
        self._send(200, b"", {"ETag": f'"{stored["etag"]}"', "x-goog-generation": stored["generation"]})

    def _store(self, bucket: str, key: str, body: bytes, generation: str | None = None) -> tuple[int, bytes]:
        parameters = {"uploadType": "multipart", **({"ifGenerationMatch": generation} if generation else {})}
        name = json.dumps({"name": unquote(key)}).encode()
        head = b"--%b\r\nContent-Type: application/json\r\n\r\n%b\r\n--%b\r\nContent-Type: binary/octet-stream\r\n\r\n"
        message = head % (_BOUNDARY, name, _BOUNDARY) + body + b"\r\n--%b--\r\n" % _BOUNDARY
        path = f"/upload/storage/v1/b/{bucket}/o?{urlencode(parameters)}"
        headers = {"Content-Type": f"multipart/related; boundary={_BOUNDARY.decode()}"}
        status, _, data = self.gcs.request("POST", path, message, headers)
        return status, data

    def _multipart(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> None:
        if "uploads" in query:
            number = quote(f"{key}-{time.monotonic_ns()}", safe="")
            self.gcs.uploads[number] = {}
            tags = f"<Bucket>{bucket}</Bucket><Key>{key}</Key><UploadId>{number}</UploadId>"
            self._send(200, f"<InitiateMultipartUploadResult>{tags}</InitiateMultipartUploadResult>".encode())
        elif self.command == "PUT":
            self.gcs.uploads[query["uploadId"]][int(query["partNumber"])] = body
            self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        elif self.command == "DELETE":
            self.gcs.uploads.pop(query["uploadId"], None)
            self._send(204, b"")
        else:
            parts = self.gcs.uploads.pop(query["uploadId"])
            numbers = [int(part.findtext("PartNumber") or 0) for part in ElementTree.fromstring(body)]
            _, data = self._store(bucket, key, b"".join(parts[number] for number in numbers))
            stored = json.loads(data)
            text = f"<CompleteMultipartUploadResult><ETag>{stored['etag']}</ETag></CompleteMultipartUploadResult>"
            self._send(200, text.encode(), {"x-goog-generation": stored["generation"]})

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._send(status, text.encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_gcs(folder: Path, buckets: tuple[str, ...] = ()) -> Iterator[Gcs]:
    """Serve until the block ends, even if it raises an error. `folder` is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    key, public = folder / "key.pem", folder / "public.pem"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    subprocess.run(["openssl", "rsa", "-in", str(key), "-pubout", "-out", str(public)], check=True, capture_output=True)
    port = programs.free_port()
    backend = f"http://127.0.0.1:{port}"
    command = (
        str(programs.program("fake-gcs-server")), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port),
        "-backend", "memory", "-log-level", "error", "-public-host", f"127.0.0.1:{port}", "-external-url", backend,
    )  # fmt: skip
    front = ThreadingHTTPServer(("127.0.0.1", 0), _Front)
    front.daemon_threads = True
    gcs = Gcs(f"http://127.0.0.1:{front.server_address[1]}", folder, backend)
    front.RequestHandlerClass = type("Front", (_Front,), {"gcs": gcs})
    with programs.running(command, backend, folder / "server.log"):
        thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            for bucket in buckets:
                gcs.create_bucket(bucket)
            yield gcs
        finally:
            front.shutdown()
            front.server_close()
