"""`make push`: both images in a registry, and Helm values that name them by digest."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from images import cli, push
from images.engines import Buildah
from images.errors import ImagesError
from images.push import Pushed
from images.recipe import RECIPES, Order, content_key
from testkit.registry_server import running_registry

ROOT = Path(__file__).parents[2]
IMAGE = f"localhost/finetune-push-test:{os.getpid()}"
_PUSHED = {
    "operator": Pushed("registry.test/team/finetune-operator", "0.1.0-abc", "sha256:" + "1" * 64),
    "trainer": Pushed("registry.test/team/finetune-trainer", "0.1.0-def", "sha256:" + "2" * 64),
}


@pytest.mark.parametrize(
    "registry", ["registry.example.com", "registry.example.com/team/", "127.0.0.1:5000", "ghcr.io/a-b/c_d"]
)
def test_a_registry_is_a_host_with_or_without_a_path(registry: str) -> None:
    assert push.checked(registry) == registry.rstrip("/")


@pytest.mark.parametrize(
    "registry", ["", "https://registry", "Registry.example.com", "host/UPPER", "host; rm -rf", "a b"]
)
def test_what_is_no_registry_is_refused_with_an_example(registry: str) -> None:
    with pytest.raises(ImagesError, match=r"REGISTRY=registry\.example\.com/team"):
        push.checked(registry)


@pytest.mark.parametrize(
    ("registry", "plain"),
    [("127.0.0.1:5000", True), ("localhost/x", True), ("localhost.example.com", False), ("registry.test:5000", False)],
)
def test_only_a_registry_of_this_machine_needs_no_tls(registry: str, plain: bool) -> None:
    assert push.is_plain_http(registry) is plain


def test_the_values_name_both_images_by_digest_in_the_chart(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    push.write_values(_PUSHED, file)
    values = yaml.safe_load(file.read_text())
    assert values["image"] == vars(_PUSHED["operator"])
    assert values["trainer"]["image"] == vars(_PUSHED["trainer"])
    chart = yaml.safe_load((ROOT / "charts/finetune-operator/values.yaml").read_text())
    assert values["image"].keys() <= chart["image"].keys()
    assert values["trainer"]["image"].keys() <= chart["trainer"]["image"].keys()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[str]:
    environment = {**os.environ, **Buildah(tmp_path).environment}
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY file /\n")
    (tmp_path / "file").write_bytes(os.urandom(200_000))
    subprocess.run(
        ["buildah", "build", "--tag", IMAGE, str(tmp_path)], env=environment, check=True, capture_output=True
    )
    yield IMAGE
    subprocess.run(["buildah", "rmi", "--force", IMAGE], env=environment, check=True, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="buildah, run as root, makes the image")
def test_an_image_is_pushed_and_its_digest_is_that_of_the_registry(image: str, tmp_path: Path) -> None:
    with running_registry() as registry:
        target = f"{registry.address}/team/finetune-push-test:1"
        digest = Buildah(tmp_path).push(image, target, plain_http=True)
        _, manifest = registry.manifests["team/finetune-push-test", digest]
        layers = json.loads(manifest)["layers"]
        assert registry.manifests["team/finetune-push-test", "1"][1] == manifest
        assert all(len(registry.blobs[layer["digest"]]) == layer["size"] for layer in layers)


def test_make_push_without_a_registry_says_what_to_give() -> None:
    ended = subprocess.run(["make", "push"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "make push REGISTRY=registry.example.com/team" in ended.stderr


def test_a_wrong_registry_is_refused_before_anything_is_built() -> None:
    command = [sys.executable, "-m", "images", "--engine", "buildah", "push", "https://registry"]
    ended = subprocess.run(command, cwd=ROOT / "hack", capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "without https://" in ended.stderr


class RecordingEngine:
    """Stands in for an engine whose images are up to date, and records what it is told to push."""

    name = "recording"

    def __init__(self, base: str = "base") -> None:
        self.base = base
        self.pushed: list[tuple[str, str, bool]] = []

    def default_base(self) -> str:
        return self.base

    def built_key(self, image: str) -> str:
        recipe = next(recipe for recipe in RECIPES.values() if image.startswith(recipe.repository))
        return content_key(cli.files_of(recipe), self.base)

    def build(self, order: Order, context: Path) -> None:
        raise AssertionError(f"{order.image} is up to date")

    def push(self, image: str, target: str, *, plain_http: bool) -> str:
        self.pushed.append((image, target, plain_http))
        return "sha256:" + str(len(self.pushed)) * 64


@pytest.mark.parametrize(
    ("base", "is_named"),
    [("python:3.11-slim", False), ("python@sha256:" + "a" * 64, True), ("localhost/finetune-base:1f2e", True)],
)
def test_a_base_image_that_is_named_by_a_tag_is_mentioned(
    base: str, is_named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = RecordingEngine(base)
    options = argparse.Namespace(registry="registry.test/team", values=tmp_path / "v.yaml", tag="dev", base=base)
    cli.push_all(engine, options)  # type: ignore[arg-type]
    assert ("BASE=NAME@sha256" in capsys.readouterr().err) is not is_named


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_begins_with_the_one_base_image(name: str) -> None:
    """So that a digest in BASE pins all that isn't in the lock file."""
    lines = (ROOT / RECIPES[name].dockerfile).read_text().splitlines()
    stages = {fields[3] for line in lines if (fields := line.split())[:1] == ["FROM"] and len(fields) > 3}
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} - stages == {"${BASE}"}
    assert not [
        line
        for line in lines
        if line.startswith(("ADD ", "COPY --from="))
        and not (line.startswith("COPY --from=") and line.split("=", 1)[1].split()[0] in stages)
    ]


def test_both_images_are_pushed_under_a_tag_that_changes_with_their_content(tmp_path: Path) -> None:
    engine, file = RecordingEngine(), tmp_path / "values.yaml"
    options = argparse.Namespace(registry="registry.test/team/", values=file, tag="dev", base=None)
    cli.push_all(engine, options)  # type: ignore[arg-type]
    key = engine.built_key(RECIPES["operator"].tagged("dev"))
    operator, trainer = engine.pushed
    assert operator[0] == "localhost/finetune-operator:dev"
    assert operator[1].startswith("registry.test/team/finetune-operator:")
    assert operator[1].endswith(f"-{key}")
    assert trainer[1].startswith("registry.test/team/finetune-trainer:")
    values = yaml.safe_load(file.read_text())
    assert values["image"]["digest"] == "sha256:" + "1" * 64
    assert values["trainer"]["image"]["digest"] == "sha256:" + "2" * 64
    assert f"{values['image']['repository']}:{values['image']['tag']}" == operator[1]
