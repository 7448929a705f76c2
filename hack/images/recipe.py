"""Defines what each image is made of, and the key that changes with it.

Pure: file contents are arguments; nothing reads a file, the environment or a clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

LABEL_KEY = "finetune-operator.io/content-key"
DOCKER_BASE = "python:3.11-slim"


@dataclass(frozen=True)
class Recipe:
    """One image. `sources` are the folders that its Dockerfile copies.

    The project's lock file belongs to every image.
    """

    name: str
    repository: str
    dockerfile: str
    sources: tuple[str, ...]

    def tagged(self, tag: str) -> str:
        """Returns the image's name with this tag."""
        return f"{self.repository}:{tag}"

    def inputs(self) -> tuple[str, ...]:
        """Returns the files and folders of the repository that can change the image."""
        return (self.dockerfile, ".dockerignore", "pyproject.toml", "uv.lock", *self.sources)


RECIPES = {
    "operator": Recipe(
        name="operator",
        repository="localhost/finetune-operator",
        dockerfile="operator/Dockerfile",
        sources=("operator/finetune_api", "operator/finetune_operator"),
    ),
    "trainer": Recipe(
        name="trainer",
        repository="localhost/finetune-trainer",
        dockerfile="trainer_image/Dockerfile",
        sources=("operator/finetune_api", "trainer_image/finetune_trainer", "benchmarks/gpu", "tests/testkit"),
    ),
}


@dataclass(frozen=True)
class Order:
    """One build: its Dockerfile, the image's name, its base image, labels and build arguments."""

    dockerfile: str
    image: str
    base: str
    labels: tuple[tuple[str, str], ...]
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """The content key, which becomes a label of the image."""
        return dict(self.labels)[LABEL_KEY]

    def options(self) -> list[str]:
        """Returns the options that Docker and buildah share, without the context."""
        arguments = (("BASE", self.base), *self.arguments)
        return [
            "--file",
            self.dockerfile,
            "--tag",
            self.image,
            *(word for name, value in arguments for word in ("--build-arg", f"{name}={value}")),
            *(word for name, value in self.labels for word in ("--label", f"{name}={value}")),
        ]


def names_content(base: str) -> bool:
    """Whether a base image's name stands for one content: its digest, or a name of this machine
    that changes with what the image is made of."""
    return "@sha256:" in base or base.startswith("localhost/")


def content_key(files: Mapping[str, bytes], base: str) -> str:
    """Returns 16 hex digits that change with the files' names and contents and the base's name.

    The order of `files` doesn't matter.
    """
    digest = hashlib.sha256(base.encode())
    for name in sorted(files):
        digest.update(f"\0{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()[:16]


def order(recipe: Recipe, tag: str, base: str, files: Mapping[str, bytes], version: str) -> Order:
    """Returns the build of `recipe` from `files` (contents by path in the repository) on `base`."""
    return Order(
        dockerfile=recipe.dockerfile,
        image=recipe.tagged(tag),
        base=base,
        labels=(
            ("org.opencontainers.image.version", version),
            ("org.opencontainers.image.base.name", base),
            (LABEL_KEY, content_key(files, base)),
        ),
    )
