"""A server that answers with a redirect to another one leads no client there: object stores, the
hub and MLflow. The other server counts what arrives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages.run import AzureConfig, GcsConfig, Location, MlflowConfig, S3Config
from finetune_trainer.errors import RunError
from finetune_trainer.reporting.trackers import mlflow_tracker
from finetune_trainer.reporting.trackers.worker import Subject
from finetune_trainer.storage.base import FileInfo, Storage
from finetune_trainer.storage.requests import redirects
from finetune_trainer.storage.schemes import Access, open_folder
from trainer.support.supervisor_process import JobSetup

_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


@contextmanager
def _server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    handler = type("Handler", (BaseHTTPRequestHandler,), {f"do_{method}": answer for method in _METHODS})
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def arrived() -> Iterator[tuple[int, list[str]]]:
    """A server that answers everything, its port, and what it was asked."""
    requests: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        requests.append(f"{request.command} {request.path}")
        request.send_response(200)
        for name, value in {
            "ETag": '"1"',
            "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT",
            "Content-Length": "6",
        }.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(b"secret")

    with _server(answer) as port:
        yield port, requests


_SECRETS = {
    "s3": {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
    "az": {"AZURE_STORAGE_ACCOUNT": "account", "AZURE_STORAGE_KEY": "a2V5"},
}
_OPERATIONS: dict[str, Callable[[Storage], object]] = {
    "list": lambda storage: storage.list(),
    "head": lambda storage: storage.head("a"),
    "read": lambda storage: storage.read("a"),
    "write": lambda storage: storage.write("a", b"1"),
    "create": lambda storage: storage.create("a", b"1"),
    "download": lambda storage: storage.download(FileInfo("a", 3), Path("/dev/null")),
    "delete": lambda storage: storage.delete(("a",)),
}


def _access(url: str) -> Access:
    """How a pod opens stores at this URL, with what its Secret and the administrator name."""
    s3, gcs = S3Config(allow_http=True, endpoint=url), GcsConfig(allow_http=True, endpoint=url)
    azure = AzureConfig(allow_http=True, endpoint=f"{url}/account", account="account")
    return Access(s3, {}, gcs, azure, retries=0, retry_seconds=5.0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_store_leads_no_client_to_another_server(
    scheme: str, status: int, arrived: tuple[int, list[str]], tmp_path: Path
) -> None:
    port, requests = arrived

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        request.send_response(status)
        request.send_header("Location", f"http://localhost:{port}{request.path}")
        request.send_header("Content-Length", "0")
        request.end_headers()

    keys: Path | None = None
    if scheme in _SECRETS:
        keys = tmp_path / "keys"
        keys.mkdir()
        for name, value in _SECRETS[scheme].items():
            (keys / name).write_text(value)
    with _server(answer) as own:
        uri = f"{scheme}://bucket/folder"
        location = Location(uri=uri, display=uri, credentials=str(keys) if keys else None)
        storage = open_folder(location, "output", _access(f"http://127.0.0.1:{own}"))
        for name, operation in _OPERATIONS.items():
            with pytest.raises(RunError) as refused:
                operation(storage)
            assert refused.value.reason in ("InvalidConfig", "StorageUnavailable"), name
            if name in ("list", "head", "read"):
                assert "redirects to another server" in refused.value.message
    assert requests == []


@pytest.mark.parametrize(
    ("scheme", "options", "environment", "hosts"),
    [
        ("s3", {"endpoint": "http://minio.storage:9000", "access_key_id": "a"}, {}, ("minio.storage",)),
        ("s3", {"access_key_id": "a"}, {}, redirects._SERVICES["s3"]),
        ("s3", {"endpoint": "https://[fd00::1]:9000"}, {"AWS_ACCESS_KEY_ID": "a"}, ("fd00::1",)),
        ("gs", {"base_url": "http://gcs.test", "skip_signature": True}, {}, ("gcs.test",)),
        ("az", {"endpoint": "https://store.test/account", "account_key": "k"}, {}, ("store.test",)),
    ],
)
def test_keys_need_no_other_server_than_the_store(
    scheme: str, options: dict[str, Any], environment: dict[str, str], hosts: tuple[str, ...]
) -> None:
    assert redirects.allowed_hosts(scheme, options, environment) == hosts


def test_an_identity_needs_the_servers_that_give_it() -> None:
    environment = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.5:99/v1"}
    hosts = redirects.allowed_hosts("s3", {}, environment)
    assert {"127.0.0.5", "amazonaws.com", "169.254.170.23"} <= set(hosts)
    assert "login.microsoftonline.com" in redirects.allowed_hosts("az", {"client_secret": "x"}, {})
    proof = {"client_secret": "x", "authority_host": "https://login.test"}
    assert "login.test" in redirects.allowed_hosts("az", proof, {})


def test_an_encrypted_store_cant_lead_to_one_that_isnt() -> None:
    options = {"endpoint": "https://store.test", "access_key_id": "a", "client_options": {"allow_http": True}}
    assert redirects.client_options("s3", options, {})["allow_http"] is False


@pytest.mark.parametrize(
    ("endpoint", "environment", "proxy", "direct"),
    [
        ("https://store.test", {"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128", None),
        ("https://store.test", {"https_proxy": "proxy:3128", "NO_PROXY": "*"}, "http://proxy:3128", "store.test"),
        ("https://a.store.test", {"ALL_PROXY": "http://p", "no_proxy": "x, .store.test"}, "http://p", "a.store.test"),
        ("http://10.1.2.3:9000", {"HTTP_PROXY": "http://p", "NO_PROXY": "10.0.0.0/8"}, "http://p", "10.1.2.3"),
        ("http://store.test", {"HTTPS_PROXY": "http://p"}, None, "store.test"),
    ],
)
def test_a_proxy_of_the_pod_isnt_passed_by_for_another_server(
    endpoint: str, environment: dict[str, str], proxy: str | None, direct: str | None
) -> None:
    options = {"endpoint": endpoint, "access_key_id": "a"}
    client = redirects.client_options("s3", options, environment)
    assert client["proxy_url"] == (proxy or f"http://{redirects.refusing_address()}")
    assert client.get("proxy_excludes") == direct


@pytest.mark.parametrize(
    ("artifacts", "is_taken"),
    [
        ("mlflow-artifacts:/1/run/artifacts", True),
        ("http://mlflow.ml:5000/api/2.0/mlflow-artifacts/artifacts/1", True),
        ("mlflow-artifacts://mlflow.ml:5000/1", True),
        ("http://169.254.169.254/latest/meta-data", False),
        ("mlflow-artifacts://kubernetes.default.svc/1", False),
        ("http://mlflow.ml:5000@evil.test/1", False),
        ("https://mlflow.ml/1", False),
        ("file:///scratch/model", False),
        ("s3://bucket/1", False),
        ("/scratch", False),
        ("", False),
    ],
)
def test_files_go_to_the_tracking_server_only(artifacts: str, is_taken: bool) -> None:
    assert mlflow_tracker.takes_files(artifacts, "http://mlflow.ml:5000/") is is_taken


@pytest.mark.parametrize(
    ("artifacts", "is_taken"), [("https://m/x", True), ("HTTP://m/x", False), ("http://m/x", False)]
)
def test_an_encrypted_tracking_server_gets_no_files_without_encryption(artifacts: str, is_taken: bool) -> None:
    assert mlflow_tracker.takes_files(artifacts, "https://m") is is_taken


def test_a_tracking_server_leads_no_client_to_another_server(
    arrived: tuple[int, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, requests = arrived
    received: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        received.append(request.path)
        request.send_response(307)
        request.send_header("Location", f"http://localhost:{port}{request.path}")
        request.send_header("Content-Length", "0")
        request.end_headers()

    for name in ("TIMEOUT", "MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "")  # set by the tracker, and restored after the test
    for name in ("DISABLE_TELEMETRY", "ALLOW_HTTP_REDIRECTS", "ENABLE_PROXY_MULTIPART_UPLOAD"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")
    with _server(answer) as own:
        run = JobSetup(tmp_path).run()
        config = MlflowConfig(uri=f"http://127.0.0.1:{own}", experiment="e")
        tracker = mlflow_tracker.Mlflow(config, Subject(run, tmp_path))
        with pytest.raises(Exception, match="307"):
            tracker.open()
    assert received
    assert requests == []
