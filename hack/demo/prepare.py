"""Prepares everything that the demo needs: environment, programs, images, cluster and contents.

It shows each step. It uses only the standard library, since it runs before the project's
environment exists. Whatever already exists is reused, so a second run resumes where the first one
stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from demo.clusters import ROOT, docker_answers
from images.cache import cache_root
from localcluster import packages
from steps import Problem, Step, Steps, attached, checks, run_command
from tryout.environment import Environment

# Two builds side by side use both cores while the larger one links.
PROGRAMS = (("kubectl", "pause"), ("versitygw", "helm"))
_GIB = 1 << 30
_HACK = {"PYTHONPATH": str(ROOT / "hack")}


def run(arguments: argparse.Namespace) -> int:
    """Carries out all steps of `up`. Returns the exit code."""
    docker = docker_answers()
    return run_command(
        "make demo",
        problems(docker),
        lambda: _steps(arguments.name, docker),
        lambda steps: _carry_out(steps, arguments, docker),
    )


def problems(docker: bool) -> tuple[Problem, ...]:
    """Returns what this machine lacks for the demo, with or without a Docker engine."""
    own = (_prometheus(),) if docker else (checks.root("a cluster without Docker"), _debian())
    first = not _has_images()
    disk = () if docker or not first else (checks.disk(Path("/var/lib/containers"), 20 * _GIB),)
    downloads = first or not Environment.for_demo(ROOT).is_ready()
    return checks.check(
        (
            checks.linux(),
            checks.python(),
            *own,
            checks.memory(6 * _GIB),
            *disk,
            checks.disk(cache_root(), 12 * _GIB) if first else None,
            checks.package_index() if downloads else None,
        )
    )


def _steps(name: str, docker: bool) -> Steps:
    """Returns the steps of the demo after showing what they will install."""
    steps = Steps(
        "demo",
        (
            Step("environment", "Python packages into .venv", 10, 0.2, Environment.for_demo(ROOT).is_ready),
            Step("build", "images and Kubernetes, built in parallel", 600, 0.9, _is_built),
            Step("cluster", "a cluster with its servers", 30, 0.2),
            Step(
                "images", "images into the cluster", 4, 0.3, (cache_root() / "clusters" / name / "loaded.json").exists
            ),
            Step("contents", "model, data and the operator", 15, 0.0),
            Step("job", "the FineTuneJob", 110, 0.5),
        ),
        cache_root() / "logs",
    )
    missing = [] if docker else packages.missing(packages.ALL)
    debian = f" and the Debian packages {', '.join(missing)}" if missing else ""
    print(
        f"It installs into {ROOT / '.venv'} and {cache_root()}{debian}; `make demo-down` removes the cluster.\n"
        f"{steps.overview()}",
        file=sys.stderr,
    )
    return steps


def _carry_out(steps: Steps, arguments: argparse.Namespace, docker: bool) -> int:
    python = str(ROOT / ".venv" / "bin" / "python")
    cluster, file = ["--name", arguments.name], ["--file", arguments.file]
    with steps.step("environment"):
        Environment.for_demo(ROOT).make(steps)
    with steps.step("build"):
        _build(steps, python, docker)
    for step, options in (("cluster", [*cluster, *file]), ("images", cluster), ("contents", cluster)):
        with steps.step(step):
            steps.call([python, "-m", "demo", step, *options], environment=_HACK, folder=ROOT)
    with steps.step("job", live=False):
        options = [*cluster, *file, "--picture", arguments.picture, "--keep", arguments.keep]
        return attached([python, "-m", "demo", "job", *options], ROOT, {**os.environ, **_HACK})


def _build(steps: Steps, python: str, docker: bool) -> None:
    """Builds images and the cluster's programs, and prepares model and data, in parallel.

    With Docker, kind brings the cluster, and the few other programs are built when it starts.
    """
    commands = [
        ["python3", "-m", "images", "build", "all"],
        [python, "-m", "demo_assets", "model"],
        [python, "-m", "demo_assets", "data"],
    ]
    if not docker:
        if packages.missing(packages.ALL):
            steps.call(["python3", "-m", "localcluster", "packages"], environment=_HACK, folder=ROOT)
        commands += (["python3", "-m", "localcluster", "build", *programs] for programs in PROGRAMS)
    steps.call_all(commands, environment=_HACK, folder=ROOT)


def _debian() -> Problem | None:
    missing = packages.missing(packages.ALL)
    if not missing or shutil.which("apt-get"):
        return None
    return Problem(
        f"the Debian packages {', '.join(missing)} are missing, and there is no apt-get",
        "Install their programs, or start a Docker engine and install kind.",
    )


def _prometheus() -> Problem | None:
    if shutil.which("prometheus"):
        return None
    return Problem("prometheus is not on PATH", "Install it (Debian: apt-get install prometheus).")


def _has_images() -> bool:
    folder = Path("/var/lib/containers/storage/overlay-images/images.json")
    try:
        return "localhost/finetune-trainer" in folder.read_text()
    except OSError:
        return False


def _is_built() -> bool:
    binaries = cache_root() / "bin"
    return _has_images() and all(any(binaries.glob(f"{name}-*")) for name in ("kube", "versitygw", "helm"))
