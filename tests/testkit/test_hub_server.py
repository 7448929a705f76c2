"""The hub of the testkit, used by the real huggingface_hub client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from testkit.hub_server import Hub, Repository, running_hub

BIG = bytes(range(256)) * 4096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(BIG)
    (folder / "sub dir" / "notes.txt").write_text("in a folder")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    repositories = {
        "org/open": Repository(folder, revisions=("main", "v1", "refs/pr/1")),
        "org/private": Repository(folder, token="hf_right"),
        "org/gated": Repository(folder, token="hf_right", gated=True),
    }
    with running_hub(repositories) as hub:
        yield hub


def test_a_snapshot_contains_every_file_and_has_its_commit(hub: Hub, folder: Path, tmp_path: Path) -> None:
    path = Path(snapshot_download("org/open", endpoint=hub.endpoint, cache_dir=tmp_path / "cache"))
    assert path.name == hub.repositories["org/open"].commit()
    for name in ("config.json", "model.safetensors", "sub dir/notes.txt"):
        assert (path / name).read_bytes() == (folder / name).read_bytes()


def test_allow_patterns_fetch_only_matching_files(hub: Hub, tmp_path: Path) -> None:
    path = snapshot_download("org/open", endpoint=hub.endpoint, cache_dir=tmp_path, allow_patterns=["*.json"])
    assert [file.name for file in Path(path).rglob("*") if file.is_file()] == ["config.json"]
    assert not any("safetensors" in request for request in hub.requests if request.startswith("GET"))


@pytest.mark.parametrize("revision", ["main", "v1", "refs/pr/1"])
def test_a_revision_resolves_to_the_commit(hub: Hub, revision: str) -> None:
    info = HfApi(endpoint=hub.endpoint).model_info("org/open", revision=revision)
    assert info.sha == hub.repositories["org/open"].commit()
    assert info.siblings is not None
    assert {sibling.rfilename for sibling in info.siblings} == {
        "config.json", "model.safetensors", "sub dir/notes.txt",
    }  # fmt: skip


def test_a_commit_is_a_revision_too(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repositories["org/open"].commit()
    path = snapshot_download("org/open", revision=commit, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert Path(path).name == commit


def test_a_second_snapshot_fetches_nothing_again(hub: Hub, tmp_path: Path) -> None:
    snapshot_download("org/open", endpoint=hub.endpoint, cache_dir=tmp_path)
    hub.requests.clear()
    snapshot_download("org/open", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert not [request for request in hub.requests if request.startswith("GET /org/")]


def test_a_body_cut_short_is_resumed_by_a_range(folder: Path, tmp_path: Path) -> None:
    with running_hub({"org/open": Repository(folder)}, break_after=1000) as hub:
        path = hf_hub_download("org/open", "model.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path)
        assert Path(path).read_bytes() == BIG
        assert hub.broken == {"model.safetensors"}
        assert hub.requests.count("GET /org/open/resolve/main/model.safetensors") == 2


def test_the_tree_lists_sizes(hub: Hub) -> None:
    entries = HfApi(endpoint=hub.endpoint).list_repo_tree("org/open", recursive=True)
    assert {entry.path: getattr(entry, "size", None) for entry in entries} == {
        "config.json": 2, "model.safetensors": len(BIG), "sub dir/notes.txt": 11,
    }  # fmt: skip


def test_the_right_token_opens_a_private_model(hub: Hub, tmp_path: Path) -> None:
    snapshot_download("org/private", endpoint=hub.endpoint, cache_dir=tmp_path, token="hf_right")


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_a_private_model_looks_absent_without_its_token(hub: Hub, tmp_path: Path, token: str | bool) -> None:
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("org/private", endpoint=hub.endpoint, cache_dir=tmp_path, token=token)


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_a_gated_model_is_reported_as_gated(hub: Hub, tmp_path: Path, token: str | bool) -> None:
    with pytest.raises(GatedRepoError):
        snapshot_download("org/gated", endpoint=hub.endpoint, cache_dir=tmp_path, token=token)


def test_an_unknown_model_an_unknown_revision_and_an_unknown_file_differ(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("org/none", endpoint=hub.endpoint, cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("org/open", revision="nope", endpoint=hub.endpoint, cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/open", "nope.bin", endpoint=hub.endpoint, cache_dir=tmp_path)
