"""What each image is made of and the key that says whether it changed. Pure: files come in as values.

Used by cli and engines; never reads a file, an environment or a clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

LABEL_KEY = "finetune-operator.io/content-key"
DOCKER_BASE = "python:3.11-slim"


@dataclass(frozen=True)
class Recipe:
    """One image. `sources` are the folders that its Dockerfile copies; the lock file is everyone's."""

    name: str
    repository: str
    dockerfile: str
    sources: tuple[str, ...]

    def tagged(self, tag: str) -> str:
        return f"{self.repository}:{tag}"

    def inputs(self) -> tuple[str, ...]:
        """Everything in the repository that can change the image: files and folders."""
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
        sources=("operator/finetune_api", "trainer_image/finetune_trainer"),
    ),
}


@dataclass(frozen=True)
class Order:
    """A build to be done: the recipe's file, the name it gets, its base, its labels, its build arguments."""

    dockerfile: str
    image: str
    base: str
    labels: tuple[tuple[str, str], ...]
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        return dict(self.labels)[LABEL_KEY]

    def options(self) -> list[str]:
        """The command line that Docker and buildah share, without the context."""
        arguments = (("BASE", self.base), *self.arguments)
        return [
            "--file",
            self.dockerfile,
            "--tag",
            self.image,
            *(word for name, value in arguments for word in ("--build-arg", f"{name}={value}")),
            *(word for name, value in self.labels for word in ("--label", f"{name}={value}")),
        ]


def content_key(files: Mapping[str, bytes], base: str) -> str:
    """Sixteen hex digits over names, contents and the base's name; the order of `files` does not matter."""
    digest = hashlib.sha256(base.encode())
    for name in sorted(files):
        digest.update(f"\0{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()[:16]


def order(recipe: Recipe, tag: str, base: str, files: Mapping[str, bytes], version: str) -> Order:
    """The build of `recipe` from `files` (path in the repository → content) on `base`."""
    return Order(
        dockerfile=recipe.dockerfile,
        image=recipe.tagged(tag),
        base=base,
        labels=(
            ("org.opencontainers.image.version", version),
            (LABEL_KEY, content_key(files, base)),
        ),
    )
