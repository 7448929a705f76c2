"""The S3 server of the testkit, used by the client that the trainer uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from testkit.s3_server import S3, running_s3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3"), ("models",)) as server:
        yield server


def test_a_stored_object_can_be_read_and_is_listed(s3: S3) -> None:
    store = s3.store("models", prefix="org")
    obstore.put(store, "folder/weights", bytes(9_000_000))
    assert bytes(obstore.get(store, "folder/weights").bytes()) == bytes(9_000_000)
    assert [entry["path"] for entry in obstore.list(store).collect()] == ["folder/weights"]
    assert (s3.folder / "models" / "org" / "folder" / "weights").stat().st_size == 9_000_000


def test_a_key_that_exists_is_not_created_again(s3: S3) -> None:
    store = s3.store("models")
    obstore.put(store, "once", b"1", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "once", b"2", mode="create")


def test_a_bucket_is_created_while_the_server_runs(s3: S3) -> None:
    s3.create_bucket("outputs")
    obstore.put(s3.store("outputs"), "a", b"1")


def test_a_key_that_is_not_there_and_a_wrong_secret_are_refused(s3: S3) -> None:
    with pytest.raises(FileNotFoundError):
        obstore.get(s3.store("models"), "absent")
    stranger = S3Store(
        "models",
        endpoint=s3.endpoint,
        region=s3.region,
        access_key_id=s3.access_key,
        secret_access_key="wrong",
        client_options={"allow_http": True},
    )
    with pytest.raises(BaseError):
        obstore.get(stranger, "once")


def test_nothing_answers_after_the_block(tmp_path: Path) -> None:
    with running_s3(tmp_path / "s3", ("models",)) as server:
        store = server.store("models")
        obstore.put(store, "a", b"1")
    with pytest.raises(BaseError):
        S3Store(
            "models",
            endpoint=server.endpoint,
            region=server.region,
            access_key_id="x",
            secret_access_key="y",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        ).put("a", b"2")
