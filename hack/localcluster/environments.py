"""Environments of their own for Python packages that a server of the demo or a test needs and nothing else.

Made once and kept. In ours they would weigh on the lock file (a server, a cloud's client), or can't live beside what
we run on. Called by mlflow and by tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from localcluster.errors import LocalClusterError
from localcluster.locks import exclusive
from localcluster.paths import cache_root


def environment(name: str, *packages: str, alone: tuple[str, ...] = ()) -> Path:
    """A virtual environment's folder. `alone` are installed without what they depend on."""
    folder = cache_root() / "environments" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.parent / f".{name}.lock", f"another making of the environment {name}"):
        if not (folder / "ready").exists():
            print(f"localcluster: installing {name} (once; kept in {folder.parent})", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
            _run(_uv(), "venv", "-q", "--python", sys.executable, str(folder))
            install = [_uv(), "pip", "install", "-q", "--python", str(folder / "bin" / "python")]
            if packages:
                _run(*install, *packages)
            if alone:
                _run(*install, "--no-deps", *alone)
            (folder / "ready").touch()
    return folder


def _uv() -> str:
    """The one on PATH, else the one that the Makefile keeps."""
    found = shutil.which("uv") or shutil.which("uv", path=str(cache_root() / "uv" / "bin"))
    if found is None:
        raise LocalClusterError("uv is missing; `make venv` gets it, or: pip install uv")
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LocalClusterError(f"`{' '.join(command[:4])} …` failed: {done.stderr.strip()[-500:]}")
