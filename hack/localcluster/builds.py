"""Builds the pinned programs into the cache, keyed by their content. Called by cluster and cli.

A program already in the cache needs neither Go nor the network.
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

from localcluster.errors import LocalClusterError
from localcluster.locks import exclusive
from localcluster.paths import PACKAGE, cache_root
from localcluster.toolchain import REQUIRED, find_go

KUBERNETES = "v1.36.3"
_VERSION = "k8s.io/component-base/version"
_STRIP = "-s -w"
_GIB = 1 << 30


@dataclass(frozen=True)
class Recipe:
    """One `go build` (a package of our own module) or `go install` (module@version)."""

    name: str
    package: str
    ldflags: str = _STRIP
    links: tuple[str, ...] = ()  # other names of the same program
    sources: tuple[str, ...] = ()  # files of the package folder that it is built from
    free_bytes: int = 2 * _GIB  # disk that a cold build takes

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
    Recipe("coredns", "github.com/coredns/coredns@v1.12.4"),
    Recipe("versitygw", "github.com/versity/versitygw/cmd/versitygw@v1.8.0"),
    Recipe(
        "kwok",
        "sigs.k8s.io/kwok/cmd/kwok@v0.8.0",
        f"{_STRIP} -X sigs.k8s.io/kwok/pkg/consts.Version=v0.8.0",
    ),
    Recipe(
        "helm",
        "helm.sh/helm/v4/cmd/helm@v4.3.1",
        f"{_STRIP} -X helm.sh/helm/v4/internal/version.version=v4.3.1",
    ),
)
_BY_TOOL = {tool: recipe for recipe in RECIPES for tool in (recipe.name, *recipe.links)}
TOOLS = tuple(sorted(_BY_TOOL))


def content_key(recipe: Recipe, package: Path = PACKAGE) -> str:
    """Changes with anything that changes the program: sources, pinned versions, flags, Go's language version."""
    digest = hashlib.sha256(json.dumps([recipe.name, recipe.package, recipe.ldflags, REQUIRED]).encode())
    for source in recipe.sources:
        digest.update(hashlib.sha256((package / source).read_bytes()).digest())
    return digest.hexdigest()[:16]


def tool(name: str) -> Path:
    """The path of a program, built first if the cache lacks it."""
    if name not in _BY_TOOL:
        raise LocalClusterError(f"tool {name!r}: unknown; choose from {', '.join(TOOLS)}")
    return _built(_BY_TOOL[name]) / name


def build_all() -> list[Path]:
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
        go = find_go(cache)
        print(f"localcluster: building {recipe.name} (once; kept in {folder.parent})", file=sys.stderr)
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
            f"building {recipe.name} needs {recipe.free_bytes / _GIB:.0f} GiB, {cache} has {free / _GIB:.1f} GiB free; "
            "free some, or set FINETUNE_CACHE to a folder on a larger disk"
        )


def _run_go(go: Path, recipe: Recipe, work: Path) -> None:
    env = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-trimpath", "GOBIN": str(work)}
    env["PATH"] = f"{go.parent}{os.pathsep}{env.get('PATH', '')}"
    if recipe.is_own_module:
        argv = [str(go), "build", "-mod=readonly", "-ldflags", recipe.ldflags, "-o", str(work / recipe.name)]
        argv.append(recipe.package)
        done = subprocess.run(argv, cwd=PACKAGE / "kube", env=env, capture_output=True, text=True, check=False)
    else:
        argv = [str(go), "install", "-ldflags", recipe.ldflags, recipe.package]
        done = subprocess.run(argv, cwd=work, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise LocalClusterError(f"building {recipe.name} failed ({go}):\n{tail}")
