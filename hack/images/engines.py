"""The two programs that can build an image: Docker if its engine responds, else buildah.

An engine keeps no state of its own; what was built is read from the images' labels.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from images import archive
from images.base import base_name, install_package, make_base
from images.cache import uv_program
from images.commands import answer, do, watch
from images.errors import ImagesError
from images.memory import memory_folder
from images.recipe import DOCKER_BASE, LABEL_KEY, Order

CERTIFICATES = "/etc/ssl/certs"
# If set on this machine, they are passed to pip and uv in the Dockerfiles, for a mirror of the
# package index.
INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
_PUSH_REMEDY = "Log in first (`buildah login HOST` or `docker login HOST`), and check that you may push there."
TRAINER_PEAK_BYTES = 20 << 30  # measured: a 5.2 GB layer exists four times while it is committed
COMMIT_BYTES = 11 << 30  # two of these copies are temporary


class Engine(Protocol):
    """The operations of a program that builds images."""

    @property
    def name(self) -> str: ...

    def default_base(self) -> str: ...

    def built_key(self, image: str) -> str | None:
        """Returns the content key of the image of that name, None if there is no such image."""

    def build(self, order: Order, context: Path) -> None: ...

    def size(self, image: str) -> int:
        """Returns the uncompressed bytes of all layers."""

    def export(self, image: str, path: Path, present: frozenset[str]) -> None:
        """Writes an uncompressed oci-archive without the layers whose digests are in `present`."""

    def push(self, image: str, target: str, *, plain_http: bool) -> str:
        """Pushes an image under another name; returns the digest of its manifest."""

    def clean(self, images: tuple[str, ...]) -> None:
        """Removes these images and what their builds left behind."""


@dataclass(frozen=True)
class Docker:
    """BuildKit through the docker command line; base images come from the registry."""

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

    def push(self, image: str, target: str, *, plain_http: bool) -> str:
        do(["docker", "tag", image, target])
        watch(["docker", "push", target], remedy=_PUSH_REMEDY)
        digests = do(["docker", "image", "inspect", "--format", '{{join .RepoDigests " "}}', target]).split()
        repository = target.rpartition(":")[0]
        return next(digest.partition("@")[2] for digest in digests if digest.startswith(f"{repository}@"))

    def clean(self, images: tuple[str, ...]) -> None:
        for image in images:
            answer(["docker", "image", "rm", image])


@dataclass(frozen=True)
class Buildah:
    """Debian's buildah, with its default storage; it needs neither a daemon nor a registry."""

    cache: Path
    name: str = "buildah"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "overlay"),
            "BUILDAH_ISOLATION": os.environ.get("BUILDAH_ISOLATION", "chroot"),
            **_temporary_files(),
        }

    def default_base(self) -> str:
        return base_name()

    def built_key(self, image: str) -> str | None:
        template = _label_of(".OCIv1.Config")
        command = ["buildah", "inspect", "--type", "image", "--format", template, image]
        return answer(command, self.environment) or None

    def build(self, order: Order, context: Path) -> None:
        self._check_disk(order)
        if order.base == base_name() and self._id(order.base) is None:
            make_base(self.cache / "images", self.environment)
        before = self._id(order.image)
        arguments, mounts = _local_builder()
        command = ["buildah", "build", "--layers", *order.options(), *_index_arguments(), *arguments, *mounts]
        watch([*command, str(context)], self.environment)
        if before and before != self._id(order.image):  # layers that the new image shares stay
            answer(["buildah", "rmi", before], self.environment)

    def size(self, image: str) -> int:
        return archive.image_size(image, self.environment)

    def export(self, image: str, path: Path, present: frozenset[str]) -> None:
        archive.write(image, path, present, self.environment)

    def push(self, image: str, target: str, *, plain_http: bool) -> str:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "digest"
            command = ["buildah", "push", "--digestfile", str(file), f"--tls-verify={str(not plain_http).lower()}"]
            watch([*command, image, f"docker://{target}"], self.environment, remedy=_PUSH_REMEDY)
            return file.read_text().strip()

    def clean(self, images: tuple[str, ...]) -> None:
        for image in (*images, base_name()):
            answer(["buildah", "rmi", "--force", image], self.environment)
        answer(["buildah", "rmi", "--prune"], self.environment)

    def _id(self, image: str) -> str | None:
        command = ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", image]
        return answer(command, self.environment)

    def _check_disk(self, order: Order) -> None:
        if self._id(order.image) or "trainer" not in order.image:
            return
        storage = Path("/var/lib/containers")
        free = shutil.disk_usage(storage if storage.exists() else "/").free
        if free < TRAINER_PEAK_BYTES:
            raise ImagesError(
                f"{storage} has {free >> 30} GiB free, but a first build of the trainer image temporarily needs "
                f"{TRAINER_PEAK_BYTES >> 30} GiB. Free some disk space and run this again."
            )


def choose(engine: str, cache: Path) -> Engine:
    """Returns the engine `engine`: auto, docker or buildah, which is installed if it is missing.

    For auto it is Docker if its engine responds, else buildah.
    """
    if engine == "docker" or (engine == "auto" and docker_answers()):
        return Docker()
    install_package("buildah")
    return Buildah(cache)


def docker_answers() -> bool:
    """Whether this machine has the docker program and its engine responds."""
    return bool(shutil.which("docker") and answer(["docker", "version", "--format", "{{.Server.Version}}"]))


def _label_of(config: str) -> str:
    return f'{{{{index {config}.Labels "{LABEL_KEY}"}}}}'


def _index_arguments(environment: Mapping[str, str] = os.environ) -> list[str]:
    present = [name for name in INDEX_VARIABLES if environment.get(name)]
    return [word for name in present for word in ("--build-arg", f"{name}={environment[name]}")]


def _temporary_files() -> dict[str, str]:
    """Returns where buildah puts the two temporary copies of a layer: in memory if they fit."""
    folder = None if "TMPDIR" in os.environ else memory_folder(COMMIT_BYTES)
    return {"TMPDIR": str(folder)} if folder else {}


def _local_builder() -> tuple[list[str], list[str]]:
    """Returns build arguments and mounts for this machine's certificates and uv cache.

    A cache without PyTorch isn't mounted: filling it would write every package once more.
    """
    mounts = ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"] if Path(CERTIFICATES).is_dir() else []
    cache = answer([str(uv_program() or "uv"), "cache", "dir"])
    if not cache or not any(Path(cache).glob("archive-v*/*/torch")):
        return [], mounts
    return ["--build-arg", "UV_NO_CACHE=false"], [*mounts, "--volume", f"{cache}:/root/.cache/uv:rw"]
