"""Writes an image of buildah's storage as an oci-archive without compression. Used by engines.

Layers that the destination already has can be left out: a change of code is then kilobytes, not gigabytes.
Never reads or writes a registry.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import IO

from images.commands import do
from images.errors import ImagesError


def layer_digests(image: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The digests of the image's layers, lowest first. Not compressed, a layer's digest is its diff id."""
    template = "{{range .OCIv1.RootFS.DiffIDs}}{{.}} {{end}}"
    command = ["buildah", "inspect", "--type", "image", "--format", template, image]
    return tuple(do(command, environment, remedy=f"Build it first: python3 -m images build ({image}).").split())


def unpacked(layers: Sequence[str], snapshots: Container[str]) -> frozenset[str]:
    """Of an image's layers, lowest first, those that a node has unpacked, by the names of its snapshots. Pure.

    A snapshot is named by its chain: https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid
    """
    found: set[str] = set()
    chain = ""
    for layer in layers:
        chain = f"sha256:{hashlib.sha256(f'{chain} {layer}'.encode()).hexdigest()}" if chain else layer
        if chain not in snapshots:
            break
        found.add(layer)
    return frozenset(found)


def image_size(image: str, environment: Mapping[str, str]) -> int:
    """Bytes of all layers, not compressed."""
    sizes = _stored_sizes(environment)
    return sum(sizes[digest] for digest in layer_digests(image, environment))


def write(image: str, path: Path, present: frozenset[str], environment: Mapping[str, str]) -> None:
    """Write `image` to `path`, whole or not at all; the layers in `present` are left out."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as out:
            stream(image, out, present, environment, path.parent)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def stream(image: str, out: IO[bytes], present: frozenset[str], environment: Mapping[str, str], scratch: Path) -> None:
    """Write `image` to `out` by way of `scratch`; layers in `present` are named in its manifest, but not written."""
    left_out = frozenset(layer_digests(image, environment)) & present
    push = _push_without if left_out else _push_whole
    with tempfile.TemporaryDirectory(prefix=".image-", dir=scratch) as folder:
        manifest, blobs = push(image, Path(folder), left_out, environment)
        with tarfile.open(fileobj=out, mode="w|", bufsize=1 << 20) as tar:
            _add(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
            _add(tar, "index.json", json.dumps(_index(image, manifest)).encode())
            _add(tar, f"blobs/sha256/{hashlib.sha256(manifest).hexdigest()}", manifest)
            for blob in blobs:
                tar.add(blob, f"blobs/sha256/{blob.name}")
                blob.unlink()  # two whole copies at once would be a lot of disk


def _push_whole(
    image: str, folder: Path, _: frozenset[str], environment: Mapping[str, str]
) -> tuple[bytes, list[Path]]:
    """The manifest and every blob. To `dir:`, since buildah compresses whatever it pushes to `oci:`."""
    command = ["buildah", "push", "--quiet", "--disable-compression", "--format", "oci"]
    do([*command, image, f"dir:{folder}"], environment)
    blobs = [file for file in sorted(folder.iterdir()) if len(file.name) == 64]
    return (folder / "manifest.json").read_bytes(), blobs


def _push_without(
    image: str, folder: Path, left_out: frozenset[str], environment: Mapping[str, str]
) -> tuple[bytes, list[Path]]:
    """The manifest and the blobs but those in `left_out`.

    buildah skips a blob that a layout holds: those left out lie there as files of the right size, without content.
    """
    sizes = _stored_sizes(environment)
    store = folder / "blobs" / "sha256"
    store.mkdir(parents=True)
    holes = {_hex(digest): sizes[digest] for digest in left_out}
    for name, size in holes.items():
        with (store / name).open("wb") as hole:
            hole.truncate(size)
    do(["buildah", "push", "--quiet", "--format", "oci", image, f"oci:{folder}:{image}"], environment)
    (entry,) = json.loads((folder / "index.json").read_text())["manifests"]
    manifest = _hex(entry["digest"])
    blobs = [file for file in sorted(store.iterdir()) if file.name not in {*holes, manifest}]
    return (store / manifest).read_bytes(), blobs


def _index(image: str, manifest: bytes) -> dict[str, object]:
    """The layout's entry point. containerd takes the image's whole name from an annotation of its own."""
    described = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": f"sha256:{hashlib.sha256(manifest).hexdigest()}",
        "size": len(manifest),
        "annotations": {
            "org.opencontainers.image.ref.name": image,
            "io.containerd.image.name": image,
        },
    }
    return {"schemaVersion": 2, "manifests": [described]}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _stored_sizes(environment: Mapping[str, str]) -> dict[str, int]:
    root = do(["buildah", "info", "--format", "{{.store.GraphRoot}}"], environment)
    layers = Path(root) / f"{environment['STORAGE_DRIVER']}-layers" / "layers.json"
    try:
        stored = json.loads(layers.read_text())
    except (OSError, ValueError) as error:
        raise ImagesError(f"buildah's list of layers, {layers}, cannot be read: {error}") from error
    return {layer["diff-digest"]: layer["diff-size"] for layer in stored if layer.get("diff-digest")}


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
