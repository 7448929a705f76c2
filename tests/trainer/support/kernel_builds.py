"""The builds of the compiled attention that this machine can run: one for any CPU, and one for
AVX512-BF16 if the CPU has it."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from finetune_trainer.kernels import kernel_build

BUILDS = ("portable", "this CPU") if not kernel_build.unmet_requirement() else ("portable",)


@cache
def portable() -> ctypes.CDLL:
    """Compiles the same source with a header that implements AVX-512's operations in plain C++
    (`portable/immintrin.h`)."""
    source = kernel_build.SOURCE.read_text()
    target = next(line for line in source.splitlines() if line.startswith("#pragma GCC target"))
    with TemporaryDirectory() as folder:
        copy, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        copy.write_text(source.replace(target, ""))
        include_folder = Path(__file__).with_name("portable")
        command = [
            "g++",
            *kernel_build.FLAGS,
            "-O2",
            "-w",
            "-Wno-psabi",
            "-I",
            str(include_folder),
            str(copy),
            "-o",
            str(library),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return ctypes.CDLL(str(library))


@pytest.fixture(params=BUILDS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the build of the compiled attention that computes bfloat16 during a test."""
    if request.param == "portable":
        monkeypatch.setattr(kernel_build, "library", lambda: (portable(), "compiled for any CPU"))
    return str(request.param)
