"""The images themselves, as this machine's engine builds them: size, user, and contents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from images.cache import cache_root
from images.cli import REPOSITORY
from images.engines import Buildah, choose

pytestmark = pytest.mark.e2e
OPERATOR_LIMIT_BYTES = 250e6


@pytest.fixture(scope="module")
def operator_image() -> str:
    return _build("operator")


def test_the_operator_image_is_small(operator_image: str) -> None:
    assert choose("auto", cache_root()).size(operator_image) < OPERATOR_LIMIT_BYTES


def test_an_unchanged_image_is_not_built_again(operator_image: str) -> None:
    began = time.monotonic()
    assert _build("operator") == operator_image
    assert time.monotonic() - began < 20


def test_the_operator_image_imports_all_of_itself_as_a_numbered_user_without_torch(operator_image: str) -> None:
    facts = json.loads(_output_inside(operator_image, "python", "-c", INSIDE))
    assert facts == {"uid": 65532, "broken": [], "torch": False}


INSIDE = """
import importlib, importlib.util, json, os, pkgutil
broken = []
for name in ("finetune_api", "finetune_operator"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                broken.append(f"{module.name}: {error!r}")
print(json.dumps({"uid": os.getuid(), "broken": broken, "torch": bool(importlib.util.find_spec("torch"))}))
"""


def _build(image: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "images", "build", image],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "hack")},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _output_inside(image: str, *command: str) -> str:
    """Return the output of a command in a container of that image."""
    if not isinstance(choose("auto", cache_root()), Buildah):
        docker = ["docker", "run", "--rm", "--entrypoint", command[0], image, *command[1:]]
        return subprocess.run(docker, stdout=subprocess.PIPE, text=True, check=True).stdout
    container = _buildah("from", image)
    try:
        return _buildah("run", container, "--", *command)
    finally:
        _buildah("rm", container)


def _buildah(*arguments: str) -> str:
    environment = {**os.environ, **Buildah(Path()).environment}
    done = subprocess.run(["buildah", *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()
