"""Gives a cluster's containerd the layers of an image in buildah's storage without a copy.

Both programs keep an unpacked layer as a folder for overlayfs, in the same format. The files are
hard-linked into a new snapshot of containerd, which takes seconds and no disk space, whereas an
import writes gigabytes twice. Neither program ever changes a file of a layer.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.archive import chain_ids
from localcluster.errors import LocalClusterError
from localcluster.images import Containerd

_FOLDER = re.compile(r"(?:upperdir=([^,\s]+)|-t bind (\S+))")
# ctr protects what it makes from garbage collection by this label.
_PROTECTED = "containerd.io/gc.root"


class CannotLinkError(Exception):
    """The layers can't be linked, for example because the two folders are on different disks."""


@dataclass(frozen=True)
class StoredLayer:
    """A layer in buildah's storage: its diff id and the folder with its files."""

    digest: str
    folder: Path


def stored_layers(image_id: str, images: Any, layers: Any, overlay: Path) -> list[StoredLayer]:
    """Returns an image's layers, lowest first, from the parsed images.json and layers.json.

    `overlay` is the folder that has one folder for each layer id. Raises CannotLinkError if a layer
    is missing. Pure.
    """
    by_id: Mapping[str, Any] = {layer["id"]: layer for layer in layers}
    current = next((image.get("layer", "") for image in images if image["id"] == image_id), "")
    stored: list[StoredLayer] = []
    while current:
        layer = by_id.get(current)
        if layer is None or not layer.get("diff-digest"):
            raise CannotLinkError(f"buildah's storage has no layer {current[:12]}")
        stored.insert(0, StoredLayer(layer["diff-digest"], overlay / current / "diff"))
        current = layer.get("parent", "")
    if not stored:
        raise CannotLinkError(f"buildah's storage has no image {image_id[:12]}")
    return stored


def read_layers(image_id: str, storage: Path) -> list[StoredLayer]:
    """Returns an image's layers in the overlay storage at `storage`. Raises CannotLinkError."""
    try:
        images = json.loads((storage / "overlay-images" / "images.json").read_text())
        layers = json.loads((storage / "overlay-layers" / "layers.json").read_text())
    except (OSError, ValueError) as error:
        raise CannotLinkError(f"buildah's storage can't be read: {error}") from error
    return stored_layers(image_id, images, layers, storage / "overlay")


def link(runtime: Containerd, layers: Sequence[StoredLayer]) -> list[str]:
    """Makes a snapshot of each layer that containerd lacks, and returns the names of the new ones.

    `release` must be called with them once an image refers to them. Raises CannotLinkError.
    """
    created: list[str] = []
    parent = ""
    try:
        for layer, chain in zip(layers, chain_ids([layer.digest for layer in layers]), strict=True):
            if not _exists(runtime, chain):
                _link_one(runtime, layer, chain, parent)
                created.append(chain)
            parent = chain
    except CannotLinkError:
        release(runtime, created)
        raise
    return created


def release(runtime: Containerd, snapshots: Sequence[str]) -> None:
    """Lets containerd remove these snapshots once no image refers to them."""
    for snapshot in snapshots:
        runtime.ctr("snapshots", "label", snapshot, f"{_PROTECTED}=")


def _exists(runtime: Containerd, snapshot: str) -> bool:
    try:
        runtime.ctr("snapshots", "info", snapshot)
    except LocalClusterError:
        return False
    return True


def _link_one(runtime: Containerd, layer: StoredLayer, chain: str, parent: str) -> None:
    draft = f"link-{chain}"
    if _exists(runtime, draft):  # an earlier run was interrupted
        runtime.ctr("snapshots", "remove", draft)
    try:
        runtime.ctr("snapshots", "prepare", draft, *([parent] if parent else []))
        folder = mounted_folder(runtime.ctr("snapshots", "mounts", "/mnt", draft))
        copy = ["cp", "--archive", "--link", f"{layer.folder}/.", str(folder)]
        done = subprocess.run(copy, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotLinkError(done.stderr.strip().splitlines()[0] if done.stderr.strip() else "cp failed")
        runtime.ctr("snapshots", "commit", chain, draft)
    except (LocalClusterError, CannotLinkError) as error:
        if _exists(runtime, draft):
            runtime.ctr("snapshots", "remove", draft)
        raise CannotLinkError(str(error)) from error


def mounted_folder(command: str) -> Path:
    """Returns the writable folder of a snapshot from the mount command that ctr prints. Pure.

    Raises CannotLinkError.
    """
    match = _FOLDER.search(command)
    if not match:
        raise CannotLinkError(f"no folder in {command!r}")
    return Path(match[1] or match[2])
