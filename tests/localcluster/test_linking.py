"""Layers of buildah's storage become snapshots of containerd by hard links."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from images.archive import chain_ids
from localcluster import LocalClusterError
from localcluster.images import Containerd
from localcluster.linking import CannotLinkError, StoredLayer, link, mounted_folder, release, stored_layers

_LAYERS = [
    {"id": "one", "diff-digest": "sha256:1"},
    {"id": "two", "parent": "one", "diff-digest": "sha256:2"},
    {"id": "other", "diff-digest": "sha256:9"},
]


def test_the_layers_of_an_image_are_ordered_from_the_lowest() -> None:
    images = [{"id": "image", "layer": "two"}]
    assert stored_layers("image", images, _LAYERS, Path("/store")) == [
        StoredLayer("sha256:1", Path("/store/one/diff")),
        StoredLayer("sha256:2", Path("/store/two/diff")),
    ]


@pytest.mark.parametrize(
    ("image", "layers", "message"),
    [
        ("elsewhere", _LAYERS, "no image elsewhere"),
        ("image", _LAYERS[1:], "no layer one"),
        ("image", [{"id": "two"}], "no layer two"),
    ],
)
def test_layers_that_are_not_stored_are_not_linked(image: str, layers: list[dict[str, str]], message: str) -> None:
    with pytest.raises(CannotLinkError, match=message):
        stored_layers(image, [{"id": "image", "layer": "two"}], layers, Path("/store"))


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        ("mount -t bind /c/snapshots/1/fs /mnt -o rw,rbind\n", "/c/snapshots/1/fs"),
        ("mount -t overlay overlay /mnt -o index=off,workdir=/c/2/work,upperdir=/c/2/fs,lowerdir=/c/1/fs\n", "/c/2/fs"),
    ],
)
def test_the_folder_of_a_snapshot_is_read_from_its_mount(command: str, folder: str) -> None:
    assert mounted_folder(command) == Path(folder)


class _Ctr(Containerd):
    """A containerd of folders: it keeps the commands' semantics, as ctr 1.6 has them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0)
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "labels", {})

    def ctr(self, *arguments: str) -> str:
        root: Path = self.folder  # type: ignore[attr-defined]
        labels: dict[str, str] = self.labels  # type: ignore[attr-defined]
        match arguments[1:]:
            case ("info", name) if name not in labels:
                raise LocalClusterError(f"snapshot {name} does not exist: not found")
            case ("prepare", name, *_):
                (root / name).mkdir()
                labels[name] = "protected"
            case ("mounts", target, name):
                return f"mount -t bind {root / name} {target} -o rw,rbind"
            case ("commit", name, draft):
                (root / draft).rename(root / name)
                labels[name] = labels.pop(draft)
            case ("remove", name):
                subprocess.run(["rm", "-r", root / name], check=True)
                del labels[name]
            case ("label", name, label):
                labels[name] = label
        return ""


def _layer(folder: Path, digest: str, *files: str) -> StoredLayer:
    folder.mkdir()
    for file in files:
        (folder / file).write_text(file)
    return StoredLayer(digest, folder)


def test_files_are_linked_and_only_missing_layers_are_made(tmp_path: Path) -> None:
    runtime = _Ctr(tmp_path)
    lower, upper = _layer(tmp_path / "l", "sha256:1", "a"), _layer(tmp_path / "u", "sha256:2", "b")
    first = link(runtime, [lower])
    second = link(runtime, [lower, upper])
    chain = chain_ids(["sha256:1", "sha256:2"])
    assert (first, second) == (chain[:1], chain[1:])
    assert os.stat(tmp_path / chain[1] / "b").st_ino == os.stat(tmp_path / "u" / "b").st_ino
    release(runtime, [*first, *second])
    labels: dict[str, Any] = runtime.labels  # type: ignore[attr-defined]
    assert labels == dict.fromkeys(chain, "containerd.io/gc.root=")


def test_after_a_failure_nothing_is_left_behind_or_protected(tmp_path: Path) -> None:
    runtime = _Ctr(tmp_path)
    lower, missing = _layer(tmp_path / "l", "sha256:1", "a"), StoredLayer("sha256:2", tmp_path / "missing")
    with pytest.raises(CannotLinkError, match=re.escape("No such file or directory")):
        link(runtime, [lower, missing])
    labels: dict[str, Any] = runtime.labels  # type: ignore[attr-defined]
    assert labels == {"sha256:1": "containerd.io/gc.root="}
