"""Local folders as storage: what may be read, and what is created and deleted."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_api.messages.run import JobRef
from finetune_trainer.destination import output_check
from finetune_trainer.errors import RunError
from finetune_trainer.storage.local import LocalStorage


def test_a_link_that_leads_out_of_its_volume_is_refused(tmp_path: Path) -> None:
    claim, outside = tmp_path / "claim", tmp_path / "secret.jsonl"
    claim.mkdir()
    outside.write_text("{}")
    (claim / "train.jsonl").symlink_to(outside)
    (claim / "inside.jsonl").write_text("{}")
    (claim / "link.jsonl").symlink_to(claim / "inside.jsonl")
    storage = LocalStorage(claim, role="dataset", display="pvc://claim", bounds=claim)
    with pytest.raises(RunError, match="leads out of its volume"):
        storage.head("train.jsonl")
    assert storage.head("link.jsonl") is not None
    with pytest.raises(RunError, match="leads out of its volume"):
        storage.read("../secret.jsonl")


def test_a_folder_creates_only_what_is_not_there_and_leaves_no_part_behind(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, role="output", display="x")
    assert storage.create("a/b.json", b"1")
    assert not storage.create("a/b.json", b"2")
    storage.write("a/b.json", b"3")
    assert storage.read("a/b.json") == b"3"
    assert [entry.path for entry in storage.list()] == ["a/b.json"]
    storage.delete(("a/b.json", "a/none"))
    assert list(tmp_path.iterdir()) == []


NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def refuse_links(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Makes this machine's file system one without hard links, which answers with an errno."""

    def link(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("number", NO_LINKS, ids=errno.errorcode.get)
def test_a_file_system_without_hard_links_creates_only_what_is_not_there(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch, number)
    storage = LocalStorage(tmp_path, role="output", display="x")
    assert storage.create("finetune/manifest.json", b"1")
    assert not storage.create("finetune/manifest.json", b"2")
    assert storage.read("finetune/manifest.json") == b"1"
    assert [entry.path for entry in storage.list()] == ["finetune/manifest.json"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_of_many_jobs_that_create_a_manifest_at_once_one_wins_and_is_never_read_in_part(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        refuse_links(monkeypatch, errno.EPERM)
    storage = LocalStorage(tmp_path, role="output", display="x")
    contents = [bytes([48 + job]) * 200_000 for job in range(8)]
    read_while_created: set[bytes] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            read_while_created.add(storage.read("manifest.json") or b"")

    with ThreadPoolExecutor(len(contents) + 1) as pool:
        watching = pool.submit(watch)
        try:
            created = list(pool.map(lambda data: storage.create("manifest.json", data), contents))
        finally:
            ended.set()
        watching.result()
    assert created.count(True) == 1
    winner = contents[created.index(True)]
    assert storage.read("manifest.json") == winner
    assert read_while_created <= {b"", winner}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_file_system_that_can_create_nothing_safely_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE file systems without these operations answer in this way."""

    def renameat2(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    refuse_links(monkeypatch, errno.EPERM)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=renameat2))
    storage = LocalStorage(tmp_path, role="output", display="pvc://claim/v1")
    with pytest.raises(RunError, match="supports neither hard links nor a rename that never replaces") as refused:
        storage.create("finetune/manifest.json", b"1")
    assert refused.value.reason == "InvalidConfig"
    assert refused.value.message.startswith("output.uri: pvc://claim/v1: ")
    assert "another storage class" in refused.value.message
    assert "owner and mode" not in refused.value.message
    assert storage.list() == ()
    with pytest.raises(RunError, match="supports neither hard links"):  # the preflight notices it
        output_check.probe(storage, JobRef(namespace="ns", name="job", uid="u", attempt=1))


def test_the_probe_of_a_destination_leaves_nothing_even_if_one_before_it_was_killed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, role="output", display="x")
    job = JobRef(namespace="ns", name="job", uid="u", attempt=1)
    storage.write("finetune/.probe-u-1", b"")
    output_check.probe(storage, job)
    output_check.probe(storage, job)
    assert list(tmp_path.iterdir()) == []
