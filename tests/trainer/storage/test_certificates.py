"""The clients of S3, of the Hub and of trackers trust the authority that the operator's caBundle
names: a real TLS server has a certificate that only that authority has signed."""

from __future__ import annotations

import http.server
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_operator.core.pods.certificates import variables
from testkit import certificates

_LISTING = b"<ListBucketResult><Name>b</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
_MODEL = b'{"id": "owner/model", "sha": "abc", "siblings": []}'
_CLIENTS = {
    "S3": "import obstore.store as o; "
    "s = o.S3Store('b', endpoint=URL, skip_signature=True, region='x', retry_config={'max_retries': 0}); "
    "print(list(s.list()))",
    "the Hub": "import huggingface_hub as h; print(h.HfApi(endpoint=URL, token=False).model_info('owner/model').sha)",
    "trackers": "import requests; print(requests.get(URL).status_code)",
}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = _LISTING if "list-type" in self.path else _MODEL
        self.send_response(200)
        self.send_header("Content-Type", "application/xml" if body is _LISTING else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Yields the URL of the server and the certificate of its authority."""
    folder = tmp_path_factory.mktemp("tls")
    certificates.localhost(folder)
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    listener.socket = context.wrap_socket(listener.socket, server_side=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"https://localhost:{listener.server_address[1]}", folder / "ca.crt"
    listener.shutdown()


@pytest.mark.parametrize("client", _CLIENTS)
@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "not trusted"])
def test_a_server_is_trusted_by_the_authority_of_the_bundle(
    server: tuple[str, Path], client: str, trusted: bool
) -> None:
    url, authority = server
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp")}
    environment |= dict(variables(str(authority))) if trusted else {}
    code = _CLIENTS[client].replace("URL", repr(url))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode == 0) is trusted, done.stderr[-500:]
