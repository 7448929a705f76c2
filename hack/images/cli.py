"""The command line. It prints only its result on stdout; everything else goes to stderr."""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from images import push
from images.cache import cache_root
from images.engines import Engine, choose
from images.errors import ImagesError
from images.recipe import RECIPES, Recipe, names_content, order

REPOSITORY = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after an error."""
    options = _parser().parse_args(arguments)
    try:
        engine = choose(options.engine, cache_root())
        options.run(engine, options)
    except ImagesError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


def build(engine: Engine, options: argparse.Namespace) -> None:
    """Builds each image unless it matches its sources, and prints its name."""
    for name in _names(options.image):
        print(_built(engine, RECIPES[name], options.tag, options.base or engine.default_base()), flush=True)


def export(engine: Engine, options: argparse.Namespace) -> None:
    """Writes an image as an uncompressed archive and prints its path."""
    present = frozenset(options.without.read_text().split()) if options.without else frozenset[str]()
    began = time.monotonic()
    path = options.path.resolve()
    engine.export(options.name, path, present)
    _report(f"{options.name}: {path.stat().st_size / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s")
    print(path)


def size(engine: Engine, options: argparse.Namespace) -> None:
    """Prints each image's name and uncompressed size."""
    for name in _names(options.image):
        print(f"{RECIPES[name].tagged(options.tag)} {engine.size(RECIPES[name].tagged(options.tag)) / 1e6:.1f} MB")


def push_all(engine: Engine, options: argparse.Namespace) -> None:
    """Builds and pushes both images, and prints the file with the Helm values that name them."""
    registry, base = push.checked(options.registry), options.base or engine.default_base()
    if not names_content(base):
        _report(f"the base image {base} is named by a tag, which may stand for another image tomorrow; name it by its "
                "digest for images that can be built again: make push BASE=NAME@sha256:...")  # fmt: skip
    pushed = {}
    for name, recipe in RECIPES.items():
        image = _built(engine, recipe, options.tag, base)
        repository = f"{registry}/{image.rpartition(':')[0].rpartition('/')[2]}"
        tag = f"{_version()}-{engine.built_key(image)}"
        _report(f"pushing {repository}:{tag}")
        digest = engine.push(image, f"{repository}:{tag}", plain_http=push.is_plain_http(registry))
        pushed[name] = push.Pushed(repository, tag, digest)
    push.write_values(pushed, options.values)
    print(options.values)


def clean(engine: Engine, options: argparse.Namespace) -> None:
    """Removes both images and what their builds left behind."""
    engine.clean(tuple(recipe.tagged(options.tag) for recipe in RECIPES.values()))


def files_of(recipe: Recipe, repository: Path = REPOSITORY) -> dict[str, bytes]:
    """Returns the contents of all files that can change the image, by path in the repository.

    Raises ImagesError if one is missing.
    """
    contents: dict[str, bytes] = {}
    for name in recipe.inputs():
        path = repository / name
        if not path.exists():
            raise ImagesError(f"{name} is missing in {repository}: the {recipe.name} image is built from it.")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix != ".pyc":
                contents[file.relative_to(repository).as_posix()] = file.read_bytes()
    return contents


def _built(engine: Engine, recipe: Recipe, tag: str, base: str) -> str:
    files = files_of(recipe)
    version = tomllib.loads(files["pyproject.toml"].decode())["project"]["version"]
    build_order = order(recipe, tag, base, files, version)
    if engine.built_key(build_order.image) == build_order.key:
        _report(f"{build_order.image} is up to date ({build_order.key})")
        return build_order.image
    with _no_other_build(recipe):
        if engine.built_key(build_order.image) != build_order.key:
            _report(f"building {build_order.image} with {engine.name} on {base}")
            began = time.monotonic()
            engine.build(build_order, REPOSITORY)
            _report(f"{build_order.image} built in {time.monotonic() - began:.0f} s")
    return build_order.image


@contextmanager
def _no_other_build(recipe: Recipe) -> Iterator[None]:
    """Waits until no other process builds this image; that may leave nothing to do.

    The kernel releases the lock when its holder dies.
    """
    path = cache_root() / f".image-{recipe.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _version() -> str:
    version: str = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    return version


def _names(image: str) -> list[str]:
    return list(RECIPES) if image == "all" else [image]


def _report(message: str) -> None:
    print(f"images: {message}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="images", description="Builds the container images of the operator and the trainer."
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "docker", "buildah"),
        default="auto",
        help="auto (default): Docker if its engine responds, else buildah",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    image = (*RECIPES, "all")

    build_parser = commands.add_parser("build", help="build an image if its content changed, and print its name")
    build_parser.add_argument("image", choices=image)
    build_parser.add_argument("--tag", default="dev", help="default: dev")
    build_parser.add_argument(
        "--base", help="base image (default: python:3.11-slim with Docker, a Debian made here with buildah)"
    )
    build_parser.set_defaults(run=build)

    export_parser = commands.add_parser("export", help="write an image as an uncompressed archive")
    export_parser.add_argument("name", help="the image's full name, e.g. localhost/finetune-trainer:dev")
    export_parser.add_argument("path", type=Path, help="the file to write")
    export_parser.add_argument(
        "--without",
        type=Path,
        metavar="FILE",
        help="leave out the layers whose digests are listed in FILE, since the destination has them",
    )
    export_parser.set_defaults(run=export)

    size_parser = commands.add_parser("size", help="print an image's uncompressed size")
    size_parser.add_argument("image", choices=image)
    size_parser.add_argument("--tag", default="dev", help="default: dev")
    size_parser.set_defaults(run=size)

    push_parser = commands.add_parser(
        "push", help="build and push both images, and write Helm values with their digests"
    )
    push_parser.add_argument("registry", metavar="REGISTRY", help="host and path, e.g. registry.example.com/team")
    push_parser.add_argument(
        "--values", type=Path, default=Path("values-images.yaml"), help="default: values-images.yaml"
    )
    push_parser.add_argument("--tag", default="dev", help="tag of the local images (default: dev)")
    push_parser.add_argument(
        "--base", help="base image (default: python:3.11-slim with Docker, a Debian made here with buildah)"
    )
    push_parser.set_defaults(run=push_all)

    clean_parser = commands.add_parser("clean", help="remove the images, their base and what builds left behind")
    clean_parser.add_argument("--tag", default="dev", help="default: dev")
    clean_parser.set_defaults(run=clean)
    return parser
