"""Compiles the Triton kernels for GPUs on a machine without one, and prints the bytes that each
spills, as JSON. ptxas comes with Triton."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from finetune_trainer.kernels.cuda import triton_kernels as kernels

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_MAX_SHARED_BYTES = 99 * 1024  # of a thread block, on the smallest of these GPUs
_NORM = {"rows": "i32", "columns": "i32"}


def sources(half: str = "*bf16") -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Returns, by name, a kernel with its signature, its constants and its number of warps."""
    forward = dict.fromkeys(("hidden", "delta", "weight", "total", "out"), half) | {"inverse": "*fp32"} | _NORM
    forward |= {"epsilon": "fp32"}
    names = ("slope", "beyond", "hidden", "weight")
    backward = dict.fromkeys(names, half) | {"inverse": "*fp32", "by_hidden": half, "by_weight": "*fp32"} | _NORM
    backward |= {"blocks": "i32", "programs": "i32"}
    products = dict.fromkeys(("gate", "up", "out"), half) | {"size": "i32"}
    slopes = dict.fromkeys(("slope", "gate", "up", "by_gate", "by_up"), half) | {"size": "i32"}
    numbers = ("length", "head_count", "half", "batch_stride", "head_stride", "token_stride", "table_stride")
    rotary = dict.fromkeys(("heads", "out", "cos", "sin"), half) | dict.fromkeys(numbers, "i32")
    listed: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {}
    for width, rows, warps in ((128, 32, 8), (4096, 1, 8), (8192, 1, 32)):
        tile = {"R": rows, "C": width}
        for add in (False, True) if width == 4096 else (True,):
            name = f"norm-{width}{'-sum' if add else ''}"
            listed[name] = kernels.norm_forward, forward, {"ADD": add, "SHIFTED": False, **tile}, warps
            constants = {"ADD": add, "SHIFTED": add, "WEIGHT": add, **tile}
            listed[f"{name}-backward"] = kernels.norm_backward, backward, constants, warps
    for gelu in (False, True):
        name = "geglu" if gelu else "swiglu"
        listed[name] = kernels.gated_forward, products, {"GELU": gelu, "B": 2048}, 8
        listed[f"{name}-backward"] = kernels.gated_backward, slopes, {"GELU": gelu, "B": 2048}, 8
    for back in (False, True):
        listed[f"rotary{'-backward' if back else ''}"] = kernels.rotate, rotary, {"BACKWARD": back, "H": 32, "D": 64}, 4
    return listed


def spilled_bytes(kernel: Any, architecture: int, folder: Path) -> int:
    """Returns the bytes that ptxas spills when it assembles a compiled kernel."""
    (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
    suffix = "a" if architecture >= 90 else ""
    command = [_ptxas(architecture), "-v", f"--gpu-name=sm_{architecture}{suffix}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill", done.stdout + done.stderr))


def _ptxas(architecture: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(architecture).path)


def main() -> None:
    spilled: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (function, signature, constants, warps) in sources().items():
            types = signature | dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=function, signature=types, constexprs=constants)
            for architecture in ARCHITECTURES:
                target = GPUTarget("cuda", architecture, 32)
                kernel = triton.compile(source, target=target, options={"num_warps": warps})
                assert kernel.asm["cubin"]
                assert kernel.metadata.shared <= _MAX_SHARED_BYTES
                spilled[f"{name} sm_{architecture}"] = spilled_bytes(kernel, architecture, Path(folder))
    print(json.dumps(spilled))


if __name__ == "__main__":
    main()
