"""Creates separate virtual environments for packages that only one server or test needs.

They are created once and cached. In the project's environment these packages would inflate the
lock file (a server, a cloud client) or conflict with its own dependencies.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from images.cache import uv_program
from localcluster.errors import LocalClusterError
from localcluster.locks import exclusive
from localcluster.paths import cache_root


def environment(name: str, *packages: str, without_dependencies: tuple[str, ...] = ()) -> Path:
    """Returns the folder of a virtual environment with these packages, created if it is missing.

    `without_dependencies` are installed without the packages that they depend on. Raises
    LocalClusterError if the installation fails.
    """
    folder = cache_root() / "environments" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.parent / f".{name}.lock", f"another process that creates the environment {name}"):
        if not (folder / "ready").exists():
            print(f"localcluster: installing {name} (once; cached in {folder.parent})", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
            _run(_uv(), "venv", "-q", "--python", sys.executable, str(folder))
            install = [_uv(), "pip", "install", "-q", "--python", str(folder / "bin" / "python")]
            if packages:
                _run(*install, *packages)
            if without_dependencies:
                _run(*install, "--no-deps", *without_dependencies)
            (folder / "ready").touch()
    return folder


def _uv() -> str:
    uv = uv_program()
    if uv is None:
        raise LocalClusterError("uv is missing; run `make venv` or `pip install uv`")
    return str(uv)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LocalClusterError(f"`{' '.join(command[:4])} …` failed: {done.stderr.strip()[-500:]}")
