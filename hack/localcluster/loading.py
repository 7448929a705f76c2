"""`load`: an image from buildah's storage or an OCI archive into a running cluster. Called by cluster.

What was imported is remembered by its id beside containerd's root, so the same image is not imported twice.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from localcluster import packages
from localcluster.errors import LocalClusterError
from localcluster.images import Containerd
from localcluster.locks import exclusive
from localcluster.paths import ClusterPaths, cluster_paths

NAME_KEYS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_GIB = 1 << 30


@dataclass(frozen=True)
class Source:
    """An image to load: its full name, an id that changes with its content, and what writes it as an archive."""

    name: str
    id: str
    write: Callable[[IO[bytes]], None]


def full_name(image: str) -> str:
    """The name that the kubelet looks up: with its registry and tag. Pure."""
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
    """The same OCI index, its one image carrying `name` for containerd. Pure."""
    document = json.loads(index)
    manifests = [
        {**manifest, "annotations": {**manifest.get("annotations", {}), NAME_KEYS[0]: name}}
        for manifest in document["manifests"]
    ]
    return json.dumps({**document, "manifests": manifests}).encode()


def load(cluster_name: str, image: str) -> None:
    """Imports `image` unless the same content is there under the same name."""
    paths = cluster_paths(cluster_name)
    runtime = Containerd.of(paths)
    if not runtime.answers():
        raise LocalClusterError(
            f"cluster {cluster_name!r} has no node to load {image!r} onto; run `up` without --control-plane-only"
        )
    with exclusive(paths.root / ".load.lock", f"another load into cluster {cluster_name!r}"):
        archive = Path(image)
        source = from_archive(archive) if archive.is_file() else _from_buildah(image)
        remembered = _remembered(paths)
        if remembered.get(source.name) == source.id and runtime.has(source.name):
            print(f"{source.name} is already on cluster {cluster_name}")
            return
        started = time.monotonic()
        runtime.import_stream(source.write)
        _remember(paths, {**remembered, source.name: source.id})
        print(f"{source.name} is on cluster {cluster_name} after {time.monotonic() - started:.1f} s")


def from_archive(archive: Path) -> Source:
    """An OCI archive; its name comes from its own annotations."""
    try:
        with tarfile.open(archive) as tar:
            member = next(m for m in tar if m.name.removeprefix("./") == "index.json")
            content = tar.extractfile(member)
            index = content.read() if content else b"{}"
        [manifest] = json.loads(index)["manifests"]
    except (tarfile.TarError, StopIteration, ValueError, KeyError) as error:
        raise LocalClusterError(
            f"{archive}: not an OCI archive with one image ({error!r}); write one with "
            f"`buildah push --disable-compression NAME oci-archive:{archive}:NAME`"
        ) from error
    annotations = manifest.get("annotations", {})
    name = next((annotations[key] for key in NAME_KEYS if key in annotations), "")
    if not name:
        raise LocalClusterError(
            f"{archive}: the image in it has no name; write it as oci-archive:{archive.name}:NAME:TAG"
        )
    full = full_name(name)

    def write(out: IO[bytes]) -> None:
        with tarfile.open(archive) as tar, tarfile.open(fileobj=out, mode="w|") as copy:
            for entry in tar:
                content = tar.extractfile(entry) if entry.isfile() else None
                if entry.name.removeprefix("./") == "index.json":
                    entry.size, content = len(renamed), io.BytesIO(renamed)
                copy.addfile(entry, content)

    renamed = named_index(index, full)
    return Source(full, manifest["digest"], write)


def _from_buildah(image: str) -> Source:
    packages.ensure(packages.BUILDAH)
    inspected = _buildah("inspect", "--type", "image", "--format", "{{.FromImageID}}", image)
    if inspected.returncode:
        raise LocalClusterError(
            f"image {image!r}: neither a file nor an image of local buildah storage "
            f"({inspected.stderr.strip().splitlines()[-1:]}); build it first, or give an OCI archive"
        )
    full = full_name(image)
    return Source(full, inspected.stdout.strip(), lambda out: _stream_buildah(image, full, out))


def _stream_buildah(image: str, name: str, out: IO[bytes]) -> None:
    """By way of an uncompressed OCI folder: gzip would cost 30 s for a large image."""
    scratch = Path(os.environ.get("TMPDIR", "/var/tmp"))  # noqa: S108 -- where buildah keeps its own
    free = shutil.disk_usage(scratch).free
    with tempfile.TemporaryDirectory(prefix="localcluster-load-", dir=scratch) as folder:
        pushed = _buildah("push", "--quiet", "--disable-compression", image, f"oci:{folder}:{name}")
        if pushed.returncode:
            raise LocalClusterError(
                f"buildah can't write {image!r} to {folder} ({free / _GIB:.1f} GiB free there): "
                f"{pushed.stderr.strip()}"
            )
        index = Path(folder) / "index.json"
        index.write_bytes(named_index(index.read_bytes(), name))
        with subprocess.Popen(["tar", "-C", folder, "-cf", "-", "."], stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None  # noqa: S101 -- it is a pipe
            shutil.copyfileobj(tar.stdout, out, 1 << 20)
        if tar.returncode:
            raise LocalClusterError(f"tar can't read {folder}: exit code {tar.returncode}")


def _buildah(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {"STORAGE_DRIVER": "overlay", "BUILDAH_ISOLATION": "chroot", **os.environ}
    return subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False, env=env)


def _remembered(paths: ClusterPaths) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(paths.loaded.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        print(f"localcluster: {paths.loaded} is damaged, importing again", file=sys.stderr)
        return {}
    return loaded


def _remember(paths: ClusterPaths, loaded: dict[str, Any]) -> None:
    draft = paths.loaded.with_suffix(".tmp")
    draft.write_text(json.dumps(loaded, indent=1))
    draft.rename(paths.loaded)
