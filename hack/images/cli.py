"""The command line of images. Prints its answer, and nothing else, on stdout; everything else goes to stderr."""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from images.cache import cache_root
from images.engines import Engine, choose
from images.errors import ImagesError
from images.recipe import RECIPES, Recipe, order

REPOSITORY = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        engine = choose(options.engine, cache_root())
        options.run(engine, options)
    except ImagesError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


def build(engine: Engine, options: argparse.Namespace) -> None:
    """Print each image's name once it stands and is what the sources say."""
    for name in _names(options.image):
        print(_built(engine, RECIPES[name], options.tag, options.base or engine.default_base()), flush=True)


def export(engine: Engine, options: argparse.Namespace) -> None:
    present = frozenset(options.without.read_text().split()) if options.without else frozenset[str]()
    began = time.monotonic()
    path = options.path.resolve()
    engine.export(options.name, path, present)
    _say(f"{options.name}: {path.stat().st_size / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s")
    print(path)


def size(engine: Engine, options: argparse.Namespace) -> None:
    for name in _names(options.image):
        print(f"{RECIPES[name].tagged(options.tag)} {engine.size(RECIPES[name].tagged(options.tag)) / 1e6:.1f} MB")


def clean(engine: Engine, options: argparse.Namespace) -> None:
    engine.clean(tuple(recipe.tagged(options.tag) for recipe in RECIPES.values()))


def files_of(recipe: Recipe, repository: Path = REPOSITORY) -> dict[str, bytes]:
    """Path in the repository → content, of everything that can change the image."""
    found: dict[str, bytes] = {}
    for name in recipe.inputs():
        place = repository / name
        if not place.exists():
            raise ImagesError(f"{name} is missing in {repository}: the {recipe.name} image is built from it.")
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.is_file() and file.suffix != ".pyc":
                found[file.relative_to(repository).as_posix()] = file.read_bytes()
    return found


def _built(engine: Engine, recipe: Recipe, tag: str, base: str) -> str:
    files = files_of(recipe)
    version = tomllib.loads(files["pyproject.toml"].decode())["project"]["version"]
    wanted = order(recipe, tag, base, files, version)
    if engine.built_key(wanted.image) == wanted.key:
        _say(f"{wanted.image} is up to date ({wanted.key})")
        return wanted.image
    _say(f"building {wanted.image} with {engine.name} on {base}")
    began = time.monotonic()
    engine.build(wanted, REPOSITORY)
    _say(f"{wanted.image} built in {time.monotonic() - began:.0f} s")
    return wanted.image


def _names(image: str) -> list[str]:
    return list(RECIPES) if image == "all" else [image]


def _say(words: str) -> None:
    print(f"images: {words}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="images", description="The operator's and the trainer's container image.")
    parser.add_argument(
        "--engine",
        choices=("auto", "docker", "buildah"),
        default="auto",
        help="auto: Docker where its engine answers, else buildah",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    image = (*RECIPES, "all")

    one = commands.add_parser("build", help="build an image if its content changed, and print its name")
    one.add_argument("image", choices=image)
    one.add_argument("--tag", default="dev", help="default: dev")
    one.add_argument("--base", help="base image; default: python:3.11-slim, with buildah a Debian made here")
    one.set_defaults(run=build)

    one = commands.add_parser("export", help="write an image as an uncompressed archive")
    one.add_argument("name", help="the image's whole name, e.g. localhost/finetune-trainer:dev")
    one.add_argument("path", type=Path, help="the file to write")
    one.add_argument(
        "--without",
        type=Path,
        metavar="FILE",
        help="leave out the layers whose digests stand in FILE, since the destination has them",
    )
    one.set_defaults(run=export)

    one = commands.add_parser("size", help="print an image's size, not compressed")
    one.add_argument("image", choices=image)
    one.add_argument("--tag", default="dev", help="default: dev")
    one.set_defaults(run=size)

    one = commands.add_parser("clean", help="remove the images, their base and what builds left")
    one.add_argument("--tag", default="dev", help="default: dev")
    one.set_defaults(run=clean)
    return parser
