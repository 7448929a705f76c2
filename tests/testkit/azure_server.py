"""A real server of Azure's blob storage (Azurite) on a loopback port, and an authority that signs
applications in, for tests that need no cluster."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, quote, urlencode

from obstore.store import AzureStore

from localcluster import azurite
from testkit import programs

ACCOUNT = "testkit"
ACCOUNT_KEY = base64.b64encode(b"a storage account's key, 32 bytes").decode()
TENANT, CLIENT = "11111111-2222-3333-4444-555555555555", "66666666-7777-8888-9999-000000000000"
CLIENT_SECRET = "testkit-client-secret"
FEDERATED_TOKEN = "a-token-of-the-cluster"
_VERSION = "2021-08-06"


@dataclass(frozen=True)
class Azure:
    """A running server with one storage account. Its folder has the log."""

    endpoint: str
    folder: Path

    def create_container(self, name: str) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        text = f"PUT{chr(10) * 12}x-ms-date:{now}\nx-ms-version:{_VERSION}\n{resource}"
        headers = {"x-ms-date": now, "x-ms-version": _VERSION, "Content-Length": "0"}
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{_signature(text)}"
        url = f"{self.endpoint}/{name}?restype=container"
        request = urllib.request.Request(url, method="PUT", headers=headers)
        urllib.request.urlopen(request, timeout=30, context=ssl._create_unverified_context()).close()

    def store(self, container: str) -> AzureStore:
        """Return an obstore client of that container."""
        options = {"allow_http": True}
        return AzureStore(
            container, account_name=ACCOUNT, account_key=ACCOUNT_KEY, endpoint=self.endpoint, client_options=options
        )

    def environment(self) -> dict[str, str]:
        """Return what a Secret named by `credentialsRef` contains for this server."""
        return {**self.place(), "AZURE_STORAGE_KEY": ACCOUNT_KEY}

    def place(self) -> dict[str, str]:
        """Return the part of it that isn't secret."""
        return {"AZURE_STORAGE_ACCOUNT": ACCOUNT, "AZURE_STORAGE_ENDPOINT": self.endpoint}


def sas(permissions: str = "rwdlac", key: str = ACCOUNT_KEY) -> str:
    """Return a shared access signature of the account, as Azure's portal gives it."""
    expiry = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    fields = {"sp": permissions, "ss": "b", "srt": "sco", "st": "", "se": expiry, "sip": "", "spr": "https,http"}
    text = "\n".join([ACCOUNT, *fields.values(), _VERSION, "", ""])
    query = {key: value for key, value in fields.items() if value}
    return f"?{urlencode({'sv': _VERSION, **query})}&sig={quote(_signature(text, key), safe='')}"


def _signature(text: str, key: str = ACCOUNT_KEY) -> str:
    return base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()


@contextmanager
def running_azure(folder: Path, containers: tuple[str, ...] = (), certificate: Path | None = None) -> Iterator[Azure]:
    """Serve until the block ends, even if it raises an error. `folder` is created if needed.

    With a certificate (`certificate`.crt and .key), the server uses TLS and also accepts the tokens
    of applications.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = programs.free_port()
    scheme, host = ("https", "localhost") if certificate else ("http", "127.0.0.1")
    tls = ("--cert", f"{certificate}.crt", "--key", f"{certificate}.key", "--oauth", "basic") if certificate else ()
    server = f"{scheme}://{host}:{port}"
    environment = {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    azure = Azure(f"{server}/{ACCOUNT}", folder)
    with programs.running(azurite.command("127.0.0.1", port, *tls), server, folder / "server.log", environment):
        for container in containers:
            azure.create_container(container)
        yield azure


@contextmanager
def running_authority() -> Iterator[str]:
    """Yield the URL of an authority that knows one application, by its secret and by federation."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Authority)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Authority(BaseHTTPRequestHandler):
    PROOFS: ClassVar = {"client_secret": CLIENT_SECRET, "client_assertion": FEDERATED_TOKEN}

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        known = self.path == f"/{TENANT}/oauth2/v2.0/token" and form.get("client_id") == [CLIENT]
        proven = any(form.get(name) == [value] for name, value in self.PROOFS.items())
        if known and proven and form.get("scope") == ["https://storage.azure.com/.default"]:
            self._send(200, {"access_token": _token(), "expires_in": 3600, "token_type": "Bearer"})
        else:
            text = "AADSTS7000215: Invalid client secret provided."
            self._send(401, {"error": "invalid_client", "error_description": text})

    def _send(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _token() -> str:
    """Return a token of which Azurite checks the times, the issuer and the audience."""
    now = int(time.time())
    claims = {
        "aud": "https://storage.azure.com", "iss": f"https://sts.windows.net/{TENANT}/", "iat": now, "nbf": now - 5,
        "exp": now + 3600,
    }  # fmt: skip
    parts = ({"alg": "HS256", "typ": "JWT"}, claims)
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join((*encoded, "signature"))
