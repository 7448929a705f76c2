"""The three object stores, as real servers that are started once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

from testkit.azure_server import Azure, running_azure
from testkit.gcs_server import Gcs, running_gcs
from testkit.s3_server import S3, running_s3

BUCKETS = ("models", "data", "outputs")


@dataclass(frozen=True)
class ObjectStore:
    """A running server, with the scheme of its URIs and the Secret's key for the endpoint."""

    scheme: Literal["s3", "gs", "az"]
    server: S3 | Gcs | Azure
    endpoint_key: str

    def uri(self, bucket: str, path: str) -> str:
        return f"{self.scheme}://{bucket}/{path}"

    def keys(self, **changes: str | None) -> dict[str, str]:
        """What a Secret contains, with other values; None leaves a key out."""
        values = {**self.server.environment(), **changes}
        return {key: value for key, value in values.items() if value is not None}

    def endpoint_at(self, url: str) -> str:
        """The endpoint of this server at another address; Azure's has the account as its path."""
        return url + urlsplit(self.server.endpoint).path

    def client(self, bucket: str) -> Any:
        """An obstore client of its own, for what the trainer's storage should find or leave."""
        return self.server.store(bucket)


@pytest.fixture(scope="session")
def object_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ObjectStore]]:
    with (
        running_s3(tmp_path_factory.mktemp("s3"), BUCKETS) as s3,
        running_gcs(tmp_path_factory.mktemp("gcs"), BUCKETS) as gcs,
        running_azure(tmp_path_factory.mktemp("azure"), BUCKETS) as azure,
    ):
        yield {
            "s3": ObjectStore("s3", s3, "AWS_ENDPOINT_URL"),
            "gs": ObjectStore("gs", gcs, "GOOGLE_BASE_URL"),
            "az": ObjectStore("az", azure, "AZURE_STORAGE_ENDPOINT"),
        }


@pytest.fixture(params=["s3", "gs", "az"])
def object_store(object_stores: dict[str, ObjectStore], request: pytest.FixtureRequest) -> ObjectStore:
    """Each of the three, one after another."""
    return object_stores[request.param]


@pytest.fixture(scope="session")
def other_account(object_stores: dict[str, ObjectStore], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of a service account that the server of Google Cloud Storage doesn't know."""
    folder = tmp_path_factory.mktemp("stranger")
    subprocess.run(["openssl", "genrsa", "-out", str(folder / "key.pem"), "2048"], check=True, capture_output=True)
    own = json.loads(object_stores["gs"].server.environment()["GOOGLE_APPLICATION_CREDENTIALS"])
    return json.dumps({**own, "private_key": (folder / "key.pem").read_text()})
