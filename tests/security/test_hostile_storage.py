"""Volumes, buckets, hubs and trackers answer whatever they like. Nothing outside of what the job
names is read, written or deleted, and one bad entry is no reason to wait."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import get_session

from finetune_api.messages.run import Location, S3Config
from finetune_trainer.data.reading import records
from finetune_trainer.data.reading.record import Unreadable
from finetune_trainer.errors import RunError
from finetune_trainer.reporting.trackers.worker import described
from finetune_trainer.storage import bounds
from finetune_trainer.storage.base import FileInfo, Role
from finetune_trainer.storage.huggingface import InternalRedirect
from finetune_trainer.storage.local import LocalStorage
from finetune_trainer.storage.schemes import Access, open_folder
from finetune_trainer.supervisor import upload

_SECRET = b"CANARY-of-another-mount"


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    (tmp_path / "credentials").write_bytes(_SECRET)
    (tmp_path / "claim" / "dir").mkdir(parents=True)
    return tmp_path / "claim"


def _storage(folder: Path, role: Role = "dataset") -> LocalStorage:
    return LocalStorage(folder, role=role, display="pvc://claim", bounds=folder)


def _download(claim: Path, name: str) -> Path:
    target = claim.parent / "scratch" / name
    _storage(claim).download(FileInfo(name, (claim / name).stat().st_size), target)
    return target


def _replace_by_link(claim: Path, name: str) -> None:
    (claim / name).unlink()
    (claim / name).symlink_to(claim.parent / "credentials")


def _replace_folder_by_link(claim: Path, name: str) -> None:
    folder = (claim / name).parent
    folder.rename(claim / "moved")
    (claim.parent / "elsewhere").mkdir()
    (claim.parent / "elsewhere" / Path(name).name).write_bytes(_SECRET)
    folder.symlink_to(claim.parent / "elsewhere")


@pytest.mark.parametrize("replace", [_replace_by_link, _replace_folder_by_link])
def test_a_small_file_cant_be_replaced_after_its_download(replace: Callable[[Path, str], None], claim: Path) -> None:
    (claim / "dir" / "train.jsonl").write_text('{"text": "row"}\n')
    downloaded = _download(claim, "dir/train.jsonl")
    replace(claim, "dir/train.jsonl")
    assert [record for _, record in records.records(downloaded, "jsonl")] == [{"text": "row"}]


@pytest.mark.parametrize("replace", [_replace_by_link, _replace_folder_by_link])
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_large_file_that_a_link_has_replaced_isnt_read(
    replace: Callable[[Path, str], None], format: records.FileFormat, claim: Path
) -> None:
    with (claim / "dir" / "train.jsonl").open("wb") as file:
        file.truncate(65 << 20)
    downloaded = _download(claim, "dir/train.jsonl")
    assert downloaded.is_symlink()
    replace(claim, "dir/train.jsonl")
    with pytest.raises(Unreadable, match="link"):
        list(records.records(downloaded, format))


@pytest.mark.parametrize("path", ["dir/KEY", "dir/deeper/KEY"])
def test_nothing_is_deleted_written_or_listed_through_a_linked_folder(path: str, claim: Path) -> None:
    outside = claim.parent / "outside"
    (outside / "deeper").mkdir(parents=True)
    file = outside / Path(path).relative_to("dir")
    file.write_bytes(_SECRET)
    (claim / "dir").rmdir()
    (claim / "dir").symlink_to(outside)
    storage = LocalStorage(claim, role="output", display="pvc://claim")  # a volume without bounds of its own
    for action in (
        lambda: storage.delete((path,)),
        lambda: storage.write(path, b"x"),
        lambda: storage.create(f"{path}2", b"x"),
        lambda: storage.upload(file, f"{path}3"),
        lambda: storage.list("dir"),
    ):
        with pytest.raises(RunError, match="AccessDenied"):
            action()
    assert [p.name for p in outside.rglob("*") if p.is_file()] == ["KEY"]


def test_checkpoints_that_are_a_link_to_those_of_another_job_stay(claim: Path) -> None:
    others = claim / "other" / "checkpoints" / "step-1"
    others.mkdir(parents=True)
    (others / "manifest.json").write_text("{}")
    (claim / "own").mkdir()
    (claim / "own" / "checkpoints").symlink_to("../other/checkpoints")
    storage = LocalStorage(claim / "own", role="output", display="pvc://claim/own", bounds=claim)
    with pytest.raises(RunError, match="AccessDenied"):
        upload.prune(storage, keep=0)
    assert (others / "manifest.json").exists()


def test_a_root_that_is_a_link_out_of_the_volume_leads_to_no_file(claim: Path) -> None:
    (claim / "own").symlink_to(claim.parent)
    storage = LocalStorage(claim / "own", role="output", display="pvc://claim/own", bounds=claim)
    source = claim.parent / "credentials"
    for action in (
        lambda: storage.delete(("credentials",)),
        lambda: storage.write("new", b"x"),
        lambda: storage.create("new", b"x"),
        lambda: storage.upload(source, "new"),
        lambda: storage.read("credentials"),
        storage.list,
    ):
        with pytest.raises(RunError, match="AccessDenied"):
            action()
    assert source.read_bytes() == _SECRET
    assert not (claim.parent / "new").exists()


class _Swapped(LocalStorage):
    """A volume on which a file is replaced by a link between two looks at it."""

    def local_path(self, path: str) -> Path:
        """Checks the path, as always; somebody else is faster than what follows."""
        full = super().local_path(path)
        _replace_by_link(self._root, path)
        return full


@pytest.mark.parametrize(
    "read",
    [lambda s, e: s.read_range(e, 0, 100), lambda s, e: s.download(e, s._root.parent / "scratch" / "copy")],
    ids=["a part", "all"],
)
def test_a_file_that_is_swapped_while_it_is_read_isnt_read(read: Callable[..., object], claim: Path) -> None:
    (claim / "model.safetensors").write_bytes(b"weights")
    entry = FileInfo("model.safetensors", 7)
    with pytest.raises(RunError, match="link"):
        read(_Swapped(claim, role="model", display="pvc://claim", bounds=claim), entry)


def _loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def _nest(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)


def _misname(folder: Path) -> None:
    (folder / os.fsdecode(b"rows-\xff.jsonl")).write_text("{}")


@pytest.mark.parametrize("prepare", [_loop, _nest, _misname])
def test_a_folder_that_cant_be_listed_is_invalid(prepare: Callable[[Path], None], claim: Path) -> None:
    prepare(claim)
    try:
        with pytest.raises(RunError) as error:
            _storage(claim).list()
    finally:
        subprocess.run(["rm", "-rf", claim / "d"], check=True)  # Python's own way is a recursion
    assert error.value.reason in ("DatasetInvalid", "StorageUnavailable")
    assert "volume" not in error.value.message
    error.value.message.encode()


class _Answers(BaseHTTPRequestHandler):
    status, headers_of_answer, body = 200, {}, b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        for name, value in self.headers_of_answer.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _answering(**attributes: Any) -> Iterator[str]:
    handler = type("Handler", (_Answers,), attributes)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def _listing(*keys: str) -> bytes:
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified>"
        "<ETag>x</ETag></Contents>"
        for key in keys
    )
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>data</Name><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
    ).encode()


@pytest.mark.parametrize("key", ["folder//x.jsonl", "folder/./x.jsonl", "folder/../x.jsonl"])
def test_a_key_that_is_no_path_isnt_waited_for(key: str) -> None:
    with _answering(body=_listing("folder/good.jsonl", key)) as endpoint:
        location = Location(uri="s3://data/folder", display="s3://data/folder")
        access = Access(S3Config(endpoint=endpoint, allow_http=True), {})
        with pytest.raises(RunError, match="key with an empty") as error:
            open_folder(location, "dataset", access).list()
    assert error.value.reason == "DatasetInvalid"


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://0xA9FEA9FE/",
        "http://168.63.129.16/machine",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[2002:a9fe:a9fe::1]/",
        "http://[::169.254.169.254]/",
        "http://[fd00:ec2::254]/latest",
        "http://100.100.100.200/latest",
    ],
)
def test_a_hub_cant_redirect_to_the_metadata_of_a_cloud(target: str) -> None:
    with _answering(status=302, headers_of_answer={"Location": target}) as hub, pytest.raises(InternalRedirect):
        get_session().get(f"{hub}/org/model/resolve/main/config.json")


@pytest.mark.parametrize(
    ("host", "internal"),
    [("10.1.2.3", True), ("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("::ffff:10.0.0.1", True),
     ("169.254.169.254", True), ("100.64.0.1", True), ("8.8.8.8", False), ("[2001:4860:4860::8888]", False),
     ("64:ff9b::a00:1", True), ("64:ff9b:1::8.8.8.8", True), ("2002:a00:1::", True), ("::ffff:0:10.0.0.1", True),
     ("fec0::1", True), ("168.63.129.16", True), ("192.0.0.192", True), ("64:ff9b::8.8.8.8", False),
     ("name.invalid", False), ("", False)],
)  # fmt: skip
def test_addresses_inside_a_cluster_are_known(host: str, internal: bool) -> None:
    assert bounds.is_internal(host) == internal


def test_a_folder_without_end_and_a_file_without_end_are_refused() -> None:
    bounds.check_count(bounds.MAX_FILES, "dataset", "s3://data/folder")
    with pytest.raises(RunError, match="DatasetInvalid"):
        bounds.check_count(bounds.MAX_FILES + 1, "dataset", "s3://data/folder")
    with pytest.raises(RunError, match="ModelInvalid"):
        bounds.check_read(bounds.MAX_READ_BYTES + 1, "model", "s3://data/index.json")


class _ServerError(Exception):
    error_code = "INTERNAL_ERROR"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(
            _ServerError("API request to endpoint /api failed with error code 404 != 200. Response body: 'INTERNAL'"),
            "_ServerError: INTERNAL_ERROR, HTTP status 404",
            id="a page",
        ),
        pytest.param(_ServerError("INTERNAL: text of the server"), "_ServerError: INTERNAL_ERROR", id="a message"),
        pytest.param(
            _ServerError("API request to http://x failed with exception Connection refused"),
            "_ServerError: API request to http://x failed with exception Connection refused",
            id="no answer",
        ),
        pytest.param(OSError("No route\x1b[31m to host"), "OSError: No route\ufffd[31m to host", id="no connection"),
    ],
)
def test_what_a_tracker_answers_isnt_shown(error: Exception, expected: str) -> None:
    assert described(error) == expected
