"""What the trainer does with a bucket, the same on all three object stores: real servers of S3, of
Google Cloud Storage and of Azure's blob storage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest

from finetune_api.messages.run import AzureConfig, GcsConfig, Location, S3Config
from finetune_trainer.destination.cleanup import clean
from finetune_trainer.errors import RunError
from finetune_trainer.storage import bucket
from finetune_trainer.storage.base import FileInfo, Role, Storage
from finetune_trainer.storage.schemes import Access, open_file, open_files, open_folder
from trainer.storage.conftest import ObjectStore
from trainer.support import supervisor_process
from trainer.support.network_outage import Relay
from trainer.support.output_folder import OWN, RECIPE, place
from trainer.support.store_proxy import LostAnswer

HTTP = {"allow_http": True}
ACCESS = Access(S3Config(**HTTP), {}, GcsConfig(**HTTP), AzureConfig(**HTTP), retries=2, retry_seconds=5.0)
WRONG: dict[str, dict[str, str | None]] = {
    "s3": {"AWS_SECRET_ACCESS_KEY": "wrong"},
    "gs": {"GOOGLE_APPLICATION_CREDENTIALS": None},  # replaced by another account's key
    "az": {"AZURE_STORAGE_KEY": "d3Jvbmc="},
}


@pytest.fixture
def folder(object_store: ObjectStore, tmp_path: Path) -> Callable[..., Storage]:
    """Opens a folder of this test's own, in `outputs` or another bucket."""

    def opened(name: str = "outputs", role: Role = "output", keys: dict[str, str] | None = None) -> Storage:
        secret = supervisor_process.secret(tmp_path / f"keys-{name}", keys or object_store.keys())
        location = supervisor_process.location(object_store.uri(name, tmp_path.name), secret)
        return open_folder(location, role, ACCESS)

    return opened


def test_files_are_stored_listed_read_and_deleted(folder: Callable[..., Storage], tmp_path: Path) -> None:
    storage = folder()
    assert storage.list() == ()
    assert (storage.head("a"), storage.read("a/b")) == (None, None)
    storage.write("a/b", b"1")
    storage.write("a/b", b"22")
    storage.write("ab/ü &.txt", b"333")
    (tmp_path / "c").write_bytes(b"4444")
    storage.upload(tmp_path / "c", "a/deep/c")
    assert [(entry.path, entry.size) for entry in storage.list()] == [("a/b", 2), ("a/deep/c", 4), ("ab/ü &.txt", 3)]
    assert [entry.path for entry in storage.list("a")] == ["a/b", "a/deep/c"]
    assert storage.head("a/b") == storage.list("a")[0]
    assert storage.read("a/b") == b"22"
    storage.delete(("a/none", "a/b", "nor/this", "a/deep/c"))
    storage.delete(("a/none",))
    assert [entry.path for entry in storage.list()] == ["ab/ü &.txt"]


def test_a_large_file_is_stored_in_parts_and_read_in_parts(
    folder: Callable[..., Storage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "PART_BYTES", 5 << 20)
    content = bytes(range(256)) * (52 << 10)  # 13 MiB
    (tmp_path / "weights").write_bytes(content)
    storage = folder()
    storage.upload(tmp_path / "weights", "weights")
    (entry,) = storage.list()
    assert storage.download(entry, tmp_path / "copy") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "copy").read_bytes() == content
    (tmp_path / "nothing").write_bytes(b"")
    storage.upload(tmp_path / "nothing", "empty")
    assert storage.read("empty") == b""


def test_a_file_that_changes_while_it_is_read_is_noticed(folder: Callable[..., Storage], tmp_path: Path) -> None:
    storage = folder()
    finders: tuple[Callable[[], FileInfo | None], ...] = (lambda: storage.head("rows"), lambda: storage.list()[0])
    for find in finders:
        storage.write("rows", b"first")
        entry = find()
        assert entry is not None
        storage.download(entry, tmp_path / "rows")
        storage.write("rows", f"other than {entry.etag}".encode()[: entry.size])
        with pytest.raises(RunError, match="changed while it was read") as refused:
            storage.download(entry, tmp_path / "rows")
        assert refused.value.reason == "StorageUnavailable"
        storage.delete(("rows",))
        with pytest.raises(RunError, match=r"(was deleted|changed) while it was read"):
            storage.download(entry, tmp_path / "rows")


def test_of_many_that_create_a_file_at_once_one_succeeds(folder: Callable[..., Storage]) -> None:
    storages = [folder() for _ in range(4)]

    def create(number: int) -> bool:
        return storages[number % 4].create("claim", f"owner {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(create, range(16)))
    assert results.count(True) == 1
    assert storages[0].read("claim") == f"owner {results.index(True)}".encode()
    assert not storages[0].create("claim", b"late")
    storages[0].delete(("claim",))
    assert storages[0].create("claim", b"next")


def test_more_files_than_a_page_has_are_listed(folder: Callable[..., Storage]) -> None:
    storage = folder()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: storage.write(f"shard-{number:04}", b""), range(1003)))
    assert [entry.path for entry in storage.list()] == [f"shard-{number:04}" for number in range(1003)]


def test_files_are_opened_by_uri_and_by_pattern(object_store: ObjectStore, tmp_path: Path) -> None:
    client = object_store.client("data")
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", "readme.md"):
        obstore.put(client, f"{tmp_path.name}/{name}", b"{}")
    secret = supervisor_process.secret(tmp_path / "keys", object_store.keys())

    def location(path: str) -> Location:
        return supervisor_process.location(object_store.uri("data", f"{tmp_path.name}/{path}"), secret)

    storage, entry = open_file(location("a.jsonl"), "dataset", ACCESS)
    assert (entry.size, storage.read(entry.path)) == (2, b"{}")
    for path, expected in (("*.jsonl", ["a.jsonl", "b.jsonl"]), ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deep/c.jsonl"])):
        assert [match.path for match in open_files(location(path), "dataset", ACCESS)[1]] == expected
    with pytest.raises(RunError, match="doesn't exist or is not a file") as refused:
        open_file(location("other.jsonl"), "dataset", ACCESS)
    assert refused.value.reason == "DatasetNotFound"


OPERATIONS: dict[str, Callable[[Storage], object]] = {
    "list": lambda storage: storage.list(),
    "head": lambda storage: storage.head("a"),
    "read": lambda storage: storage.read("a"),
    "write": lambda storage: storage.write("a", b"1"),
    "create": lambda storage: storage.create("a", b"1"),
    "upload": lambda storage: storage.upload(Path(__file__), "a"),
    "download": lambda storage: storage.download(FileInfo("a", 3), Path("/dev/null")),
    "delete": lambda storage: storage.delete(("a", "b")),
}


def refusal(storage: Storage, operation: str) -> RunError:
    with pytest.raises(RunError) as refused:
        OPERATIONS[operation](storage)
    return refused.value


def test_every_operation_names_a_bucket_that_doesnt_exist(folder: Callable[..., Storage]) -> None:
    storage = folder("nowhere")
    for operation in set(OPERATIONS) - {"delete", "download"}:
        error = refusal(storage, operation)
        assert error.reason == "OutputNotFound", operation
        assert "doesn't exist" in error.message
        assert "output.uri" in error.message
    storage.delete(("a", "b"))
    assert refusal(folder("nowhere", role="dataset"), "download").reason == "DatasetNotFound"


def test_every_operation_with_a_wrong_key_is_access_denied(
    folder: Callable[..., Storage], object_store: ObjectStore, other_account: str
) -> None:
    wrong = {**WRONG[object_store.scheme]}
    if object_store.scheme == "gs":
        wrong["GOOGLE_APPLICATION_CREDENTIALS"] = other_account
    keys = object_store.keys(**wrong)
    storage = folder(keys=keys)
    for operation in OPERATIONS:
        error = refusal(storage, operation)
        assert error.reason == "AccessDenied", f"{operation}: {error.message}"
        assert "refused the credentials" in error.message
        assert not any(value in error.message for key, value in keys.items() if "KEY" in key or "CRED" in key)


def test_every_operation_on_a_store_that_doesnt_answer_is_tried_again_and_then_unavailable(
    folder: Callable[..., Storage], object_store: ObjectStore
) -> None:
    with Relay(object_store.server.endpoint) as relay:
        relay.cut()
        keys = object_store.keys(**{object_store.endpoint_key: object_store.endpoint_at(relay.url)})
        storage = folder(keys=keys)
        for operation in OPERATIONS:
            before = relay.refused
            assert refusal(storage, operation).reason == "StorageUnavailable", operation
            # The relay counts a connection a moment after the client has lost it.
            supervisor_process.wait_until(lambda least=before + 3: relay.refused >= least)  # type: ignore[misc]
        relay.restore()
        assert storage.list() == ()


def test_what_a_deleted_job_leaves_is_deleted(folder: Callable[..., Storage], tmp_path: Path) -> None:
    storage, here = folder(), place(tmp_path, deletion_policy="Delete")
    here.with_claim(OWN, RECIPE)
    here.with_checkpoint(2, OWN)
    here.write("checkpoints/step-4/weights.safetensors", "half")
    here.with_result(OWN)
    here.write("notes.txt", "the user's own")
    for path, content in here.contents.items():
        storage.write(path, content)
    assert "deleted 1 checkpoint and the result (1 file" in clean(storage, here.run, lambda _: None)
    assert [entry.path for entry in storage.list()] == ["notes.txt"]


@pytest.mark.parametrize("status", [None, 503], ids=["no answer", "an error"])
def test_a_file_whose_creation_was_answered_by_an_error_is_created(
    folder: Callable[..., Storage], object_store: ObjectStore, status: int | None
) -> None:
    """The store has created it before the answer was lost; the next try finds it."""
    with LostAnswer(object_store.server.endpoint, status) as proxy:
        keys = object_store.keys(**{object_store.endpoint_key: object_store.endpoint_at(proxy.url)})
        storage = folder(keys=keys)
        assert storage.create("claim", b"ours")
        assert proxy.lost == 1
        assert not folder().create("claim", b"theirs")
        assert storage.read("claim") == b"ours"


def test_a_range_of_a_file_is_read_and_a_change_noticed(folder: Callable[..., Storage]) -> None:
    storage = folder()
    storage.write("weights", b"0123456789")
    (entry,) = storage.list()
    assert (storage.read_range(entry, 2, 5), storage.read_range(entry, 8, 99)) == (b"234", b"89")
    assert storage.read_range(entry, 10, 12) == b""
    storage.write("weights", b"abcdefghij")
    with pytest.raises(RunError, match="changed while it was read"):
        storage.read_range(entry, 2, 5)


def test_keys_that_are_rotated_are_read_again(object_store: ObjectStore, other_account: str, tmp_path: Path) -> None:
    wrong = {**WRONG[object_store.scheme]}
    if object_store.scheme == "gs":
        wrong["GOOGLE_APPLICATION_CREDENTIALS"] = other_account
    mounted = supervisor_process.secret(tmp_path / "keys", object_store.keys(**wrong))
    uri = object_store.uri("outputs", tmp_path.name)
    storage = open_folder(supervisor_process.location(uri, mounted), "output", ACCESS)
    assert refusal(storage, "write").reason == "AccessDenied"
    supervisor_process.secret(mounted, object_store.keys())
    storage.write("a", b"1")
    assert storage.create("a", b"2") is False
