"""A real S3 server (versitygw) on a loopback port with its own folder, for tests that need object
storage and no cluster. Its only user is root."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from obstore.store import S3Store

ROOT = Path(__file__).resolve().parents[2]
REGION = "us-east-1"
ACCESS_KEY = "testkit"
SECRET_KEY = "testkit-secret"
START_SECONDS = 10.0


@dataclass(frozen=True)
class S3:
    """A running server. A bucket is a folder under `folder`, where its objects can be read too."""

    endpoint: str
    folder: Path
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION

    def create_bucket(self, name: str) -> None:
        (self.folder / name).mkdir()

    def store(self, bucket: str, prefix: str | None = None) -> S3Store:
        """Return an obstore client of that bucket."""
        return S3Store(
            bucket,
            prefix=prefix,
            endpoint=self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region=self.region,
            client_options={"allow_http": True},
        )

    def environment(self) -> dict[str, str]:
        """Return what a Secret named by `credentialsRef` contains for this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint,
        }


@contextmanager
def running_s3(folder: Path, buckets: tuple[str, ...] = ()) -> Iterator[S3]:
    """Serve `folder` (created if needed) until the block ends, even if it raises an error.

    >>> with running_s3(tmp_path / "s3", ("models", "outputs")) as s3:
    ...     obstore.put(s3.store("models"), "a", b"1")
    """
    data, metadata = folder / "buckets", folder / "metadata"
    data.mkdir(parents=True, exist_ok=True)
    metadata.mkdir(exist_ok=True)
    port = _free_port()
    s3 = S3(endpoint=f"http://127.0.0.1:{port}", folder=data)
    for bucket in buckets:
        (data / bucket).mkdir(exist_ok=True)
    # A sidecar folder stores what versitygw would otherwise put into extended attributes, which
    # tmpfs may lack.
    command = [versitygw(), "--port", f"127.0.0.1:{port}", "--region", REGION, "--quiet", "posix"]
    environment = {**os.environ, "ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--sidecar", str(metadata), str(data)], env=environment, stdout=log, stderr=log
        )
    try:
        _wait(s3.endpoint, process, folder / "server.log")
        yield s3
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@cache
def versitygw() -> str:
    """Return the path of the server's program in the cache; it is built (1.5 min) if it isn't there
    yet."""
    done = subprocess.run(
        [sys.executable, "-m", "localcluster", "tool", "versitygw"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "hack")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


def _wait(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
            return
        except urllib.error.HTTPError:
            return  # it answers: requests without a key are refused
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"versitygw does not answer at {endpoint}: {log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
