"""Loads an image from buildah's storage or an OCI archive into a running cluster.

The ids of imported images are recorded in the cluster's folder, so the same image is not imported
twice.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from images import archive
from images.errors import ImagesError
from localcluster import packages
from localcluster.errors import LocalClusterError
from localcluster.images import Containerd
from localcluster.linking import CannotLinkError, StoredLayer, link, read_layers, release
from localcluster.locks import exclusive
from localcluster.paths import ClusterPaths, cluster_paths

NAME_KEYS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_BUILDAH = {"STORAGE_DRIVER": "overlay", "BUILDAH_ISOLATION": "chroot"}


@dataclass(frozen=True)
class Source:
    """An image to load, with its full name and its layers (lowest first).

    `id` changes with its content. `write` writes it as an OCI archive without the layers that are
    passed to it. `stored` are its unpacked layers on this machine, if it has them.
    """

    name: str
    id: str
    layers: tuple[str, ...]
    write: Callable[[IO[bytes], frozenset[str]], None]
    stored: tuple[StoredLayer, ...] = ()


def shared_layers(layers: tuple[str, ...], loaded: Iterable[list[str]]) -> frozenset[str]:
    """Returns the lowest layers that some loaded image also has, in the same positions. Pure.

    containerd has unpacked a layer only on top of the layers below it, so no others can be reused.
    """

    def common(other: list[str]) -> int:
        pairs = zip(layers, other, strict=False)
        return next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(layers), len(other)))

    shared = max(map(common, loaded), default=0)
    return frozenset(layers[:shared]) - frozenset(layers[shared:])


def full_name(image: str) -> str:
    """Returns the name that the kubelet looks up, with registry and tag. Pure."""
    path, _, tag = image.rpartition(":")
    if not path or "/" in tag:
        path, tag = image, "latest"
    first, slash, _ = path.partition("/")
    if not slash:
        path = f"docker.io/library/{path}"
    elif "." not in first and ":" not in first and first != "localhost":
        path = f"docker.io/{path}"
    return f"{path}:{tag}"


def named_index(index: bytes, name: str) -> bytes:
    """Returns the same OCI index with its one image annotated with `name` for containerd. Pure."""
    document = json.loads(index)
    manifests = [
        {**manifest, "annotations": {**manifest.get("annotations", {}), NAME_KEYS[0]: name}}
        for manifest in document["manifests"]
    ]
    return json.dumps({**document, "manifests": manifests}).encode()


def load(cluster_name: str, image: str) -> None:
    """Imports `image` on every node unless the same content is already there under the same name.

    Raises LocalClusterError if the image doesn't exist or the cluster has no node.
    """
    paths = cluster_paths(cluster_name)
    if not Containerd.of(paths).answers():
        raise LocalClusterError(
            f"cluster {cluster_name!r} has no node to load {image!r} onto; run `up` without --control-plane-only"
        )
    with exclusive(paths.root / ".load.lock", f"another load into cluster {cluster_name!r}"):
        file = Path(image)
        source = from_archive(file) if file.is_file() else _from_buildah(image, paths.root)
        started = time.monotonic()
        running = (ClusterPaths(node.parent) for node in sorted(paths.nodes.glob("[0-9]*/run")))
        imported = [_load_node(node, source) for node in (paths, *running)]
        if any(imported):
            print(f"{source.name} is on cluster {cluster_name} after {time.monotonic() - started:.1f} s")
        else:
            print(f"{source.name} is already on cluster {cluster_name}")


def _load_node(paths: ClusterPaths, source: Source) -> bool:
    """Imports the image on one node; returns False if it was there already."""
    runtime = Containerd.of(paths)
    recorded = _recorded(paths)
    if recorded.get(source.name, {}).get("id") == source.id and runtime.has(source.name):
        return False
    _import(runtime, source, [entry["layers"] for entry in recorded.values()])
    _record(paths, {**recorded, source.name: {"id": source.id, "layers": source.layers}})
    return True


def _import(runtime: Containerd, source: Source, loaded: list[list[str]]) -> None:
    """Imports without the layers that the node has, or with all if that fails.

    It fails if such a layer was removed in the meantime. Layers that are unpacked on this machine
    are linked first.
    """
    try:
        linked = link(runtime, source.stored)
    except CannotLinkError as error:
        print(f"localcluster: importing a copy of the layers of {source.name}, since: {error}", file=sys.stderr)
    else:
        if source.stored:
            runtime.import_stream(lambda out: source.write(out, frozenset(source.layers)))
            release(runtime, linked)
            return
    present = shared_layers(source.layers, loaded)
    try:
        runtime.import_stream(lambda out: source.write(out, present))
    except LocalClusterError as error:
        if not present:
            raise
        print(f"localcluster: importing {source.name} with all layers, since: {error}", file=sys.stderr)
        runtime.import_stream(lambda out: source.write(out, frozenset()))


def from_archive(file: Path) -> Source:
    """Returns the image of an OCI archive, named by its annotations. Raises LocalClusterError."""
    try:
        with tarfile.open(file) as tar:
            member = next(m for m in tar if m.name.removeprefix("./") == "index.json")
            content = tar.extractfile(member)
            index = content.read() if content else b"{}"
        [manifest] = json.loads(index)["manifests"]
    except (tarfile.TarError, StopIteration, ValueError, KeyError) as error:
        raise LocalClusterError(
            f"{file}: not an OCI archive with one image ({error!r}); write one with "
            f"`buildah push --disable-compression NAME oci-archive:{file}:NAME`"
        ) from error
    annotations = manifest.get("annotations", {})
    name = next((annotations[key] for key in NAME_KEYS if key in annotations), "")
    if not name:
        raise LocalClusterError(f"{file}: the image in it has no name; write it as oci-archive:{file.name}:NAME:TAG")
    full = full_name(name)

    def write(out: IO[bytes], _: frozenset[str]) -> None:
        with tarfile.open(file) as tar, tarfile.open(fileobj=out, mode="w|") as copy:
            for entry in tar:
                content = tar.extractfile(entry) if entry.isfile() else None
                if entry.name.removeprefix("./") == "index.json":
                    entry.size, content = len(renamed), io.BytesIO(renamed)
                copy.addfile(entry, content)

    renamed = named_index(index, full)
    return Source(full, manifest["digest"], (), write)


def _from_buildah(image: str, scratch: Path) -> Source:
    packages.ensure(packages.BUILDAH)
    environment = {name: os.environ.get(name, value) for name, value in _BUILDAH.items()}
    template = "{{.FromImageID}}{{range .OCIv1.RootFS.DiffIDs}} {{.}}{{end}}"
    inspected = subprocess.run(
        ["buildah", "inspect", "--type", "image", "--format", template, image],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if inspected.returncode:
        lines = inspected.stderr.strip().splitlines() or ["no output"]
        raise LocalClusterError(
            f"image {image!r}: neither a file nor an image of local buildah storage ({lines[-1]}); "
            "build it first, or pass an OCI archive"
        )
    identity, *layers = inspected.stdout.split()
    full = full_name(image)

    def write(out: IO[bytes], present: frozenset[str]) -> None:
        try:
            archive.stream(image, out, present, environment, scratch)
        except ImagesError as error:
            raise LocalClusterError(f"image {image!r}: {error}") from error

    return Source(full, identity, tuple(layers), write, _stored(identity, layers, environment))


def _stored(identity: str, layers: list[str], environment: dict[str, str]) -> tuple[StoredLayer, ...]:
    """Returns the image's unpacked layers; none if buildah doesn't store them in plain folders."""
    command = ["buildah", "info", "--format", "{{.store.GraphRoot}}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    try:
        stored = read_layers(identity, Path(answer.stdout.strip()))
    except CannotLinkError:
        return ()
    return tuple(stored) if [layer.digest for layer in stored] == layers else ()


def _recorded(paths: ClusterPaths) -> dict[str, Any]:
    try:
        loaded = json.loads(paths.loaded.read_text())
        return {name: {"id": entry["id"], "layers": entry["layers"]} for name, entry in loaded.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):
        print(f"localcluster: {paths.loaded} is damaged, importing again", file=sys.stderr)
        return {}


def _record(paths: ClusterPaths, loaded: dict[str, Any]) -> None:
    draft = paths.loaded.with_suffix(".tmp")
    draft.write_text(json.dumps(loaded, indent=1))
    draft.rename(paths.loaded)
