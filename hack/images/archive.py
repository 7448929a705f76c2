"""Writes an image from buildah's storage as an uncompressed oci-archive.

Layers that the destination already has can be left out: after a change of code, the archive has
kilobytes instead of gigabytes. It never reads from or writes to a registry.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from images.commands import do
from images.errors import ImagesError


def layer_digests(image: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the digests of the image's layers, lowest first.

    An uncompressed layer's digest is its diff id. Raises ImagesError if there is no such image.
    """
    template = "{{range .OCIv1.RootFS.DiffIDs}}{{.}} {{end}}"
    command = ["buildah", "inspect", "--type", "image", "--format", template, image]
    return tuple(do(command, environment, remedy=f"Build it first: python3 -m images build ({image}).").split())


def chain_ids(layers: Sequence[str]) -> list[str]:
    """Returns the chain ID of each layer (diff ids, lowest first). Pure.

    See https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid.
    """
    chain: list[str] = []
    for layer in layers:
        chain.append(f"sha256:{hashlib.sha256(f'{chain[-1]} {layer}'.encode()).hexdigest()}" if chain else layer)
    return chain


def image_size(image: str, environment: Mapping[str, str]) -> int:
    """Returns the uncompressed bytes of all layers."""
    sizes = _stored_sizes(environment)
    return sum(sizes[digest] for digest in layer_digests(image, environment))


def write(image: str, path: Path, present: frozenset[str], environment: Mapping[str, str]) -> None:
    """Writes `image` to `path` atomically; the layers in `present` are left out."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as out:
            stream(image, out, present, environment, path.parent)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def stream(image: str, out: IO[bytes], present: frozenset[str], environment: Mapping[str, str], scratch: Path) -> None:
    """Writes `image` to `out`, with temporary files in `scratch`.

    The layers in `present` are listed in its manifest, but not written.
    """
    left_out = frozenset(layer_digests(image, environment)) & present
    push = _push_without if left_out else _push_all
    with tempfile.TemporaryDirectory(prefix=".image-", dir=scratch) as folder:
        manifest, blobs = push(image, Path(folder), left_out, environment)
        with tarfile.open(fileobj=out, mode="w|", bufsize=1 << 20) as tar:
            _add(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
            _add(tar, "index.json", json.dumps(_index(image, manifest)).encode())
            _add(tar, f"blobs/sha256/{hashlib.sha256(manifest).hexdigest()}", manifest)
            for blob in blobs:
                tar.add(blob, f"blobs/sha256/{blob.name}")
                blob.unlink()  # two full copies at a time would need much disk space


def _push_all(image: str, folder: Path, _: frozenset[str], environment: Mapping[str, str]) -> tuple[bytes, list[Path]]:
    """Returns the manifest and every blob.

    It pushes to `dir:`, since buildah compresses whatever it pushes to `oci:`.
    """
    command = ["buildah", "push", "--quiet", "--disable-compression", "--format", "oci"]
    do([*command, image, f"dir:{folder}"], environment)
    blobs = [file for file in sorted(folder.iterdir()) if len(file.name) == 64]
    return (folder / "manifest.json").read_bytes(), blobs


def _push_without(
    image: str, folder: Path, left_out: frozenset[str], environment: Mapping[str, str]
) -> tuple[bytes, list[Path]]:
    """Returns the manifest and the blobs except those in `left_out`.

    buildah skips a blob that the layout already has, so those left out are put there as sparse
    files of the right size.
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
    """Returns the layout's index.json.

    containerd reads the image's full name from its own annotation, `io.containerd.image.name`.
    """
    descriptor = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": f"sha256:{hashlib.sha256(manifest).hexdigest()}",
        "size": len(manifest),
        "annotations": {
            "org.opencontainers.image.ref.name": image,
            "io.containerd.image.name": image,
        },
    }
    return {"schemaVersion": 2, "manifests": [descriptor]}


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
        raise ImagesError(f"buildah's list of layers, {layers}, can't be read: {error}") from error
    return {layer["diff-digest"]: layer["diff-size"] for layer in stored if layer.get("diff-digest")}


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
