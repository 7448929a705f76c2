"""Packs the packages that a GPU machine without network lacks as wheels into `.gpu-carry`.

It runs as `make gpu-carry`; then the folder is copied to the machine. Versions are those of
uv.lock. Of bitsandbytes only the libraries of one CUDA version are included, and DeepSpeed was
built without its CUDA operators, so it compiles nothing at run time. Together with the repository
the wheels must stay below LIMIT, which is what can be transferred to such a machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from benchmarks.gpu.packages import FOLDER, ROOT, bytes_carried

LIMIT = 64 << 20
PYTHON = "3.12"
CUDA = "130"
BUILT_HERE = ("deepspeed",)  # no wheel is published; this environment's was built with DS_BUILD_OPS=0
LOCKED = (
    "peft", "accelerate", "bitsandbytes", "obstore", "pydantic", "pydantic-core", "annotated-types",
    "typing-inspection", "hjson", "prometheus-client",
)  # fmt: skip
EXTRA = {"liger-kernel": "0.8.5"}  # compared with in benchmarks; not a dependency
_CPYTHON = f"cp{PYTHON.replace('.', '')}"
TAGS = {
    "pydantic-core": f"{_CPYTHON}-{_CPYTHON}-linux_x86_64",
    "obstore": "cp311-abi3-linux_x86_64",
    "bitsandbytes": "py3-none-linux_x86_64",
}


def main() -> None:
    target = ROOT / FOLDER
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    versions = {**_locked(), **EXTRA}
    with tempfile.TemporaryDirectory() as name:
        site = Path(name)
        _install(site, [f"{package}=={versions[package]}" for package in (*LOCKED, *EXTRA)])
        for package in (*LOCKED, *EXTRA):
            pack(_distribution(package, str(site)), target)
    for package in BUILT_HERE:
        pack(_distribution(package, *sys.path), target)
    carried, tracked = bytes_carried(target), _repository_bytes()
    for wheel in sorted(target.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
    print(f"{carried / 2**20:6.2f} MiB of wheels, {tracked / 2**20:.2f} MiB of repository, of {LIMIT / 2**20:.0f} MiB")
    if carried + tracked > LIMIT:
        raise SystemExit("this is more than can be transferred: remove a package from benchmarks/gpu/carry.py")


def _locked() -> dict[str, str]:
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    return {package["name"]: package["version"] for package in lock["package"] if "version" in package}


def _install(site: Path, requirements: list[str]) -> None:
    """Installs into `site` for the GPU machine's Python, whichever Python this machine has."""
    uv = os.environ.get("UV") or shutil.which("uv") or "uv"
    command = [uv, "pip", "install", "--quiet", "--target", str(site), "--python-version", PYTHON, "--python-platform",
               "x86_64-manylinux_2_28", "--only-binary", ":all:", "--no-deps", *requirements]  # fmt: skip
    subprocess.run(command, check=True)


def _distribution(name: str, *search_path: str) -> Distribution:
    distribution = next(iter(distributions(name=name, path=list(search_path))), None)
    if distribution is None:
        raise SystemExit(f"{name} isn't installed here: run make venv")
    return distribution


def pack(distribution: Distribution, target: Path) -> Path:
    """Packs an installed distribution as a wheel, without files that a GPU machine doesn't need."""
    name = distribution.metadata["Name"].lower().replace("_", "-")
    tag = TAGS.get(name, "py3-none-any")
    path = target / f"{name.replace('-', '_')}-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file, path_here in _files(distribution):
            archive.write(path_here, file)
    return path


def _files(distribution: Distribution) -> Iterator[tuple[str, Path]]:
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if file.suffix == ".pyc" or ".." in file.parts or not path.is_file() or not needed(str(file)):
            continue
        yield str(file), path


def needed(file: str) -> bool:
    """Whether a GPU machine needs a file; tests and other accelerators' libraries aren't. Pure."""
    if "libbitsandbytes_" in file:
        return f"cuda{CUDA}" in file or "_cpu" in file
    return "/tests/" not in file and not file.startswith("tests/")


def _repository_bytes() -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    paths = (ROOT / name.decode() for name in listed.split(b"\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


if __name__ == "__main__":
    main()
