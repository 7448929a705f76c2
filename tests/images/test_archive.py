"""A real image in buildah's storage is written as a complete archive, and without the layers that
the other side already has."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from images import archive
from images.errors import ImagesError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="buildah, run as root, makes the image")
ENVIRONMENT = {"STORAGE_DRIVER": "overlay", "BUILDAH_ISOLATION": "chroot"}
IMAGE = f"localhost/finetune-archive-test:{os.getpid()}"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("context")
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY big /\nCOPY small /\n")
    (folder / "big").write_bytes(os.urandom(300_000))
    (folder / "small").write_bytes(b"code")
    _buildah("build", "--layers", "--tag", IMAGE, str(folder))
    yield IMAGE
    _buildah("rmi", "--force", IMAGE)


def test_a_complete_archive_contains_every_layer_unchanged(image: str, tmp_path: Path) -> None:
    archive.write(image, tmp_path / "complete.tar", frozenset(), ENVIRONMENT)
    index, blobs = _read(tmp_path / "complete.tar")
    (entry,) = index["manifests"]
    assert entry["annotations"]["io.containerd.image.name"] == image
    layers = json.loads(blobs[entry["digest"]])["layers"]
    assert [layer["digest"] for layer in layers] == list(archive.layer_digests(image, ENVIRONMENT))
    assert all(len(blobs[layer["digest"]]) == layer["size"] for layer in layers)
    assert all(f"sha256:{hashlib.sha256(content).hexdigest()}" == digest for digest, content in blobs.items())


def test_layers_that_are_there_already_are_named_but_not_written(image: str, tmp_path: Path) -> None:
    big, *_ = archive.layer_digests(image, ENVIRONMENT)
    archive.write(image, tmp_path / "rest.tar", frozenset({big, "sha256:of another image"}), ENVIRONMENT)
    index, blobs = _read(tmp_path / "rest.tar")
    manifest = json.loads(blobs[index["manifests"][0]["digest"]])
    assert manifest["layers"][0]["digest"] == big
    assert manifest["layers"][0]["size"] > 300_000
    assert big not in blobs
    assert {layer["digest"] for layer in manifest["layers"][1:]} < set(blobs)
    assert (tmp_path / "rest.tar").stat().st_size < 100_000


def test_a_chain_id_covers_the_layers_below() -> None:
    first, second = "sha256:a", "sha256:b"
    both = f"sha256:{hashlib.sha256(f'{first} {second}'.encode()).hexdigest()}"
    assert archive.chain_ids([first, second]) == [first, both]


def test_nothing_but_the_archive_is_left_in_its_folder(image: str, tmp_path: Path) -> None:
    archive.write(image, tmp_path / "complete.tar", frozenset(), ENVIRONMENT)
    assert [file.name for file in tmp_path.iterdir()] == ["complete.tar"]


def test_the_size_counts_every_layer(image: str) -> None:
    assert 300_000 < archive.image_size(image, ENVIRONMENT) < 310_000


def test_an_image_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match=r"images build .*localhost/absent:dev"):
        archive.write("localhost/absent:dev", tmp_path / "x.tar", frozenset(), ENVIRONMENT)


def _buildah(*arguments: str) -> None:
    subprocess.run(["buildah", *arguments], check=True, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE)


def _read(path: Path) -> tuple[Any, dict[str, bytes]]:
    blobs: dict[str, bytes] = {}
    index = {}
    with tarfile.open(path) as tar:
        for entry in tar:
            stream = tar.extractfile(entry)
            assert stream is not None
            content = stream.read()
            if entry.name == "index.json":
                index = json.loads(content)
            elif entry.name.startswith("blobs/"):
                blobs[f"sha256:{Path(entry.name).name}"] = content
    return index, blobs
