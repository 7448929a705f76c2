"""The two programs that can build an image: Docker where its engine answers, else buildah. Used by cli.

An engine remembers nothing: what it has built is asked of it, by label.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from images import archive
from images.base import base_name, install_package, make_base
from images.commands import answer, do, watch
from images.errors import ImagesError
from images.recipe import DOCKER_BASE, LABEL_KEY, Order

CERTIFICATES = "/etc/ssl/certs"
# Read by the Dockerfiles' pip and uv where this machine has them, for a mirror of the package index.
INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
TRAINER_PEAK_BYTES = 20 << 30  # measured: a layer of 5.2 GB stands three times while it is committed


class Engine(Protocol):
    """What cli asks of a builder."""

    @property
    def name(self) -> str: ...

    def default_base(self) -> str: ...

    def built_key(self, image: str) -> str | None:
        """The content key of the image of that name, None where there is none."""

    def build(self, order: Order, context: Path) -> None: ...

    def size(self, image: str) -> int:
        """Bytes of all layers, not compressed."""

    def export(self, image: str, path: Path, present: frozenset[str]) -> None:
        """Write an oci-archive without compression, leaving out the layers in `present` (their digests)."""

    def clean(self, images: tuple[str, ...]) -> None:
        """Remove these images and what their builds left."""


@dataclass(frozen=True)
class Docker:
    """BuildKit by the docker command line; bases come from the registry."""

    name: str = "docker"

    def default_base(self) -> str:
        return DOCKER_BASE

    def built_key(self, image: str) -> str | None:
        return answer(["docker", "image", "inspect", "--format", _label_of(".Config"), image]) or None

    def build(self, order: Order, context: Path) -> None:
        before = answer(["docker", "image", "inspect", "--format", "{{.Id}}", order.image])
        command = ["docker", "build", *order.options(), *_index_arguments(), str(context)]
        watch(command, {"DOCKER_BUILDKIT": "1"})
        if before and before != answer(["docker", "image", "inspect", "--format", "{{.Id}}", order.image]):
            answer(["docker", "image", "rm", before])

    def size(self, image: str) -> int:
        return int(do(["docker", "image", "inspect", "--format", "{{.Size}}", image]))

    def export(self, image: str, path: Path, present: frozenset[str]) -> None:
        do(["docker", "save", "--output", str(path), image])

    def clean(self, images: tuple[str, ...]) -> None:
        for image in images:
            answer(["docker", "image", "rm", image])


@dataclass(frozen=True)
class Buildah:
    """Debian's buildah, without a daemon and without a registry; its storage is buildah's own default."""

    cache: Path
    name: str = "buildah"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "overlay"),
            "BUILDAH_ISOLATION": os.environ.get("BUILDAH_ISOLATION", "chroot"),
        }

    def default_base(self) -> str:
        return base_name()

    def built_key(self, image: str) -> str | None:
        template = _label_of(".OCIv1.Config")
        command = ["buildah", "inspect", "--type", "image", "--format", template, image]
        return answer(command, self.environment) or None

    def build(self, order: Order, context: Path) -> None:
        self._need_room(order)
        if order.base == base_name() and self._id(order.base) is None:
            make_base(self.cache / "images", self.environment)
        before = self._id(order.image)
        arguments, mounts = _local_builder()
        command = ["buildah", "build", "--layers", *order.options(), *_index_arguments(), *arguments, *mounts]
        watch([*command, str(context)], self.environment)
        if before and before != self._id(order.image):  # its layers stay where the new image has them too
            answer(["buildah", "rmi", before], self.environment)

    def size(self, image: str) -> int:
        return archive.image_size(image, self.environment)

    def export(self, image: str, path: Path, present: frozenset[str]) -> None:
        archive.write(image, path, present, self.environment)

    def clean(self, images: tuple[str, ...]) -> None:
        for image in (*images, base_name()):
            answer(["buildah", "rmi", "--force", image], self.environment)
        answer(["buildah", "rmi", "--prune"], self.environment)

    def _id(self, image: str) -> str | None:
        command = ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", image]
        return answer(command, self.environment)

    def _need_room(self, order: Order) -> None:
        if self._id(order.image) or "trainer" not in order.image:
            return
        storage = Path("/var/lib/containers")
        free = shutil.disk_usage(storage if storage.exists() else "/").free
        if free < TRAINER_PEAK_BYTES:
            raise ImagesError(
                f"{storage} has {free >> 30} GiB free; a first build of the trainer image needs "
                f"{TRAINER_PEAK_BYTES >> 30} GiB for a while. Free some disk and run this again."
            )


def choose(wanted: str, cache: Path) -> Engine:
    """Docker where it answers, else buildah, installed if need be. `wanted` is auto, docker or buildah."""
    if wanted == "docker" or (wanted == "auto" and docker_answers()):
        return Docker()
    install_package("buildah")
    return Buildah(cache)


def docker_answers() -> bool:
    """True where the docker program is here and its engine is up."""
    return bool(shutil.which("docker") and answer(["docker", "version", "--format", "{{.Server.Version}}"]))


def _label_of(config: str) -> str:
    return f'{{{{index {config}.Labels "{LABEL_KEY}"}}}}'


def _index_arguments(environment: Mapping[str, str] = os.environ) -> list[str]:
    given = [name for name in INDEX_VARIABLES if environment.get(name)]
    return [word for name in given for word in ("--build-arg", f"{name}={environment[name]}")]


def _local_builder() -> tuple[list[str], list[str]]:
    """Build arguments and mounts of a build on this machine: its certificates, and uv's cache if it has one."""
    mounts = ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"] if Path(CERTIFICATES).is_dir() else []
    cache = answer(["uv", "cache", "dir"])
    if not cache or not Path(cache).is_dir():
        return [], mounts
    return ["--build-arg", "UV_NO_CACHE=false"], [*mounts, "--volume", f"{cache}:/root/.cache/uv:rw"]
