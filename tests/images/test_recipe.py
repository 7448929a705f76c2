"""What changes an image's key, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer import kernel_build
from images.cli import REPOSITORY, files_of
from images.errors import ImagesError
from images.recipe import LABEL_KEY, RECIPES, content_key, order

FILES = {"a": b"1", "b": b"2"}


def test_the_order_of_files_does_not_matter() -> None:
    assert content_key(FILES, "base") == content_key(dict(reversed(FILES.items())), "base")


@pytest.mark.parametrize(
    ("files", "base"),
    [
        ({"a": b"1", "b": b"3"}, "base"),
        ({"a": b"1", "c": b"2"}, "base"),
        ({"a": b"1"}, "base"),
        ({"a": b"1b", "": b"2"}, "base"),
        (FILES, "another base"),
    ],
    ids=["content", "name", "a file less", "moved border", "base"],
)
def test_any_change_gives_another_key(files: dict[str, bytes], base: str) -> None:
    assert content_key(files, base) != content_key(FILES, "base")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_what_its_dockerfile_copies(name: str) -> None:
    recipe = RECIPES[name]
    copied = [
        line.split()[1]
        for line in (REPOSITORY / recipe.dockerfile).read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line and "/src/" not in line
    ]
    assert sorted(copied) == sorted(recipe.sources)


def test_the_attention_kernel_is_compiled_and_named_as_the_trainer_does() -> None:
    dockerfile = (REPOSITORY / "trainer_image/Dockerfile").read_text()
    assert f"g++ {' '.join(kernel_build.FLAGS)} /src/{kernel_build.SOURCE.name}" in dockerfile
    assert f'-o "/opt/finetune/attention-$(sha256sum /src/{kernel_build.SOURCE.name} | cut -c1-16).so"' in dockerfile


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_names_reaches_the_build(name: str) -> None:
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {*RECIPES[name].sources, "pyproject.toml", "uv.lock"} <= allowed


def test_the_operator_image_knows_nothing_of_the_trainer() -> None:
    assert not [name for name in files_of(RECIPES["operator"]) if "trainer" in name]


def test_byte_code_never_counts() -> None:
    assert not [name for recipe in RECIPES.values() for name in files_of(recipe) if name.endswith(".pyc")]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match=r"operator/Dockerfile is missing"):
        files_of(RECIPES["operator"], tmp_path)


def test_an_order_carries_its_key_as_a_label_and_the_base_as_an_argument() -> None:
    placed = order(RECIPES["operator"], "v1", "debian:x", FILES, "0.1.0")
    options = placed.options()
    assert placed.image == "localhost/finetune-operator:v1"
    assert f"{LABEL_KEY}={content_key(FILES, 'debian:x')}" in options
    assert options[options.index("--build-arg") + 1] == "BASE=debian:x"


@pytest.mark.parametrize("name", RECIPES)
def test_the_code_is_copied_after_everything_that_takes_long(name: str) -> None:
    lines = (REPOSITORY / RECIPES[name].dockerfile).read_text().splitlines()
    last_run = max(number for number, line in enumerate(lines) if line.startswith("RUN "))
    first_copy = min(
        number
        for number, line in enumerate(lines)
        if line.startswith("COPY ") and line.split()[1] in RECIPES[name].sources
    )
    assert last_run < first_copy


@pytest.mark.parametrize("name", RECIPES)
def test_an_image_runs_as_a_numbered_user_who_is_not_root(name: str) -> None:
    assert "\nUSER 65532:65532\n" in (REPOSITORY / RECIPES[name].dockerfile).read_text()
