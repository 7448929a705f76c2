"""Pushes both images to a registry, and writes Helm values that name them by digest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from images.errors import ImagesError

_REGISTRY = re.compile(r"[a-z0-9.-]+(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")
_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost)(:|/|$)")


@dataclass(frozen=True)
class Pushed:
    """An image in a registry; `digest` is that of its manifest."""

    repository: str
    tag: str
    digest: str


def checked(registry: str) -> str:
    """Returns the registry with its path, without a trailing slash. Raises ImagesError."""
    name = registry.rstrip("/")
    if not _REGISTRY.fullmatch(name):
        raise ImagesError(
            f"REGISTRY={registry!r} is not a registry; use host and path, in lower case and without https://, as in "
            "REGISTRY=registry.example.com/team"
        )
    return name


def is_plain_http(registry: str) -> bool:
    """Whether the registry is on this machine, where it needs no TLS."""
    return bool(_LOOPBACK.match(registry))


def values(pushed: Mapping[str, Pushed]) -> str:
    """Returns Helm values for the images `operator` and `trainer`. JSON strings are valid YAML."""
    operator, trainer = pushed["operator"], pushed["trainer"]
    return (
        "# Written by `make push`: helm install … -f FILE\n"
        f"image:\n{_image(operator, '  ')}"
        f"trainer:\n  image:\n{_image(trainer, '    ')}"
    )


def write_values(pushed: Mapping[str, Pushed], path: Path) -> None:
    """Writes the values; the file is replaced atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(values(pushed))
    partial.replace(path)


def _image(image: Pushed, indent: str) -> str:
    fields = {"repository": image.repository, "tag": image.tag, "digest": image.digest}
    return "".join(f"{indent}{name}: {json.dumps(value)}\n" for name, value in fields.items())
