"""A real S3 server (versitygw) on a loopback port with its own folder, for tests that need object
storage and no cluster. Its only user is root, unless others are added."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from obstore.store import S3Store

from testkit import programs

REGION = "us-east-1"
ACCESS_KEY = "testkit"
SECRET_KEY = "testkit-secret"


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

    def add_user(self, key: str, secret: str) -> None:
        """Create a user who may do everything; needs a server with `users`."""
        self._admin("create-user", "--access", key, "--secret", secret, "--role", "admin")

    def remove_user(self, key: str) -> None:
        """Delete a user, so that its key is refused from now on."""
        self._admin("delete-user", "--access", key)

    def _admin(self, *arguments: str) -> None:
        program = str(programs.program("versitygw"))
        command = [program, "admin", "--access", self.access_key, "--secret", self.secret_key]
        done = subprocess.run(
            [*command, "--region", self.region, "--endpoint-url", self.endpoint, *arguments],
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode:
            raise RuntimeError(f"versitygw admin {arguments[0]}: {done.stderr or done.stdout}")

    def environment(self) -> dict[str, str]:
        """Return what a Secret named by `credentialsRef` contains for this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint,
        }


@contextmanager
def running_s3(folder: Path, buckets: tuple[str, ...] = (), *, users: bool = False) -> Iterator[S3]:
    """Serve `folder` (created if needed) until the block ends, even if it raises an error. With
    `users`, more users can be added and removed.

    >>> with running_s3(tmp_path / "s3", ("models", "outputs")) as s3:
    ...     obstore.put(s3.store("models"), "a", b"1")
    """
    data, metadata = folder / "buckets", folder / "metadata"
    data.mkdir(parents=True, exist_ok=True)
    metadata.mkdir(exist_ok=True)
    port = programs.free_port()
    s3 = S3(endpoint=f"http://127.0.0.1:{port}", folder=data)
    for bucket in buckets:
        (data / bucket).mkdir(exist_ok=True)
    # A sidecar folder stores what versitygw would otherwise put into extended attributes, which
    # tmpfs may lack.
    program = str(programs.program("versitygw"))
    command = [program, "--port", f"127.0.0.1:{port}", "--region", REGION, "--quiet"]
    if users:
        (folder / "users").mkdir(exist_ok=True)
        command += ["--iam-dir", str(folder / "users"), "--iam-cache-disable"]
    command += ["posix", "--sidecar", str(metadata), str(data)]
    keys = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    with programs.running(command, s3.endpoint, folder / "server.log", keys):
        yield s3
