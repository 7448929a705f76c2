"""A rank that can't use its GPU names the driver of the node and the one that is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fake_gpu
from finetune_api.reasons import cause
from finetune_trainer.parallel.gpu_access import (
    Driver,
    cause_in,
    driver_version,
    explanation,
    is_supported,
    unsupported,
)

_ROOT = Path(__file__).parents[3]
_RANK = """
import os
from finetune_trainer.errors import RunError
from finetune_trainer.parallel import world
try:
    world.from_environment(os.environ, "cuda")
except RunError as error:
    print(error)
"""


def _refusal(libraries: Path | None, cuda_version: str = "12040", init: int = 0) -> str:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    environment = {
        **{name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"},
        **ranks,
        **({"LD_LIBRARY_PATH": str(libraries)} if libraries else {}),
        "FAKE_CUDA_VERSION": cuda_version,
        "FAKE_CUDA_INIT": str(init),
        "PYTHONPATH": f"{_ROOT / 'trainer_image'}:{_ROOT / 'operator'}",
    }
    done = subprocess.run([sys.executable, "-c", _RANK], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def test_a_driver_that_is_too_old_is_named_and_the_one_that_is_needed_too(tmp_path: Path) -> None:
    refusal = _refusal(fake_gpu.build_driver(tmp_path))
    assert refusal.startswith("GpuUnavailable: resources.gpu: a GPU can't be used: The NVIDIA driver on your system is "
                              "too old (found version 12040)")  # fmt: skip
    assert "needs driver 580 or newer" in refusal


def test_a_node_without_a_driver_is_not_the_users_mistake() -> None:
    refusal = _refusal(None)
    assert refusal.startswith("GpuUnavailable: resources.gpu: a GPU can't be used: Found no NVIDIA driver")
    assert "the node has no NVIDIA driver in its kernel" in refusal
    assert cause("GpuUnavailable") == "infrastructure"


def test_what_cuda_says_at_its_start_is_named_with_its_remedy(tmp_path: Path) -> None:
    """A driver that is new enough, on a node whose GPUs are connected by NVSwitch."""
    refusal = _refusal(fake_gpu.build_driver(tmp_path), "13000", 802)
    assert refusal.startswith("GpuUnavailable: resources.gpu: a GPU can't be used: Error 802: system not yet "
                              "initialized; the node has ")  # fmt: skip
    assert "NVIDIA's Fabric Manager, which must run on the node" in refusal


_COUNT = "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before? "


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        (_COUNT + "Error 803: system has unsupported display driver / cuda driver combination",
         "Error 803: system has unsupported display driver / cuda driver combination", "restart the node"),
        (_COUNT + "Error 804: forward compatibility was attempted on non supported HW",
         "Error 804: forward compatibility was attempted on non supported HW", "cuda-compat"),
        (_COUNT + "Error 2: out of memory", "Error 2: out of memory", "check the GPU"),
        ("No CUDA GPUs are available", "No CUDA GPUs are available", "check the GPU"),
        ("The NVIDIA driver is too old (found version 1). Please update\nmore", "The NVIDIA driver is too old (found "
         "version 1)", "check the GPU"),
    ],
    ids=["libraries of another driver", "compatibility package", "memory", "no GPU", "two sentences"],
)  # fmt: skip
def test_the_cause_is_what_cuda_says_and_not_what_pytorch_says_before_it(text: str, cause: str, remedy: str) -> None:
    assert cause_in(text) == cause
    assert remedy in explanation(cause, Driver("580.65.06", ""), "13.0")


_CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # of the locked PyTorch


@pytest.mark.parametrize(
    ("gpu", "capability", "supported"),
    [
        ("P100", (6, 0), False), ("V100", (7, 0), False), ("T4", (7, 5), True), ("A100", (8, 0), True),
        ("A10G", (8, 6), True), ("Jetson Orin", (8, 7), True), ("L40S", (8, 9), True), ("GH200", (9, 0), True),
        ("B200", (10, 0), True), ("GB300", (10, 3), True), ("Thor", (11, 0), False), ("RTX 5090", (12, 0), True),
        ("GB10", (12, 1), True),
    ],
)  # fmt: skip
def test_a_gpu_for_which_pytorch_has_no_kernels_is_refused(
    gpu: str, capability: tuple[int, int], supported: bool
) -> None:
    assert is_supported(capability, _CUDA_13) is supported
    message = unsupported(gpu, capability, _CUDA_13)
    assert message.startswith(f"resources.gpu: {gpu} has compute capability {capability[0]}.{capability[1]}, and ")
    assert "sm_75, sm_80" in message
    assert "pod.nodeSelector" in message


@pytest.mark.parametrize(
    ("architectures", "capability", "supported"),
    [
        (("sm_50", "sm_60", "sm_70"), (7, 0), True), (("sm_80", "compute_80"), (12, 0), True),
        (("sm_90a",), (9, 0), True), (("sm_90a",), (9, 1), False), (("compute_90a",), (10, 0), False),
        (("sm_100f",), (10, 3), True), (("sm_86",), (8, 0), False), ((), (9, 0), False), (("gfx942",), (9, 4), False),
    ],
)  # fmt: skip
def test_code_runs_on_the_gpus_that_its_kind_suits(
    architectures: tuple[str, ...], capability: tuple[int, int], supported: bool
) -> None:
    assert is_supported(capability, architectures) is supported


@pytest.mark.parametrize(
    ("driver", "remedy"),
    [
        (Driver("535.104.05", ""), "update the driver, or keep the job off this node with pod.nodeSelector"),
        (Driver("580.65.06", "libcuda.so.1: cannot open"), "mount them at /usr/local/nvidia/lib64"),
        (Driver("580.65.06", ""), "check the GPU and the driver of this node"),
        (Driver(None, "libcuda.so.1: cannot open"), "check the GPU and the driver of this node"),
    ],
    ids=["old", "not mounted", "new enough", "none"],
)
def test_the_remedy_depends_on_the_driver(driver: Driver, remedy: str) -> None:
    message = explanation("it fails", driver, "13.0")
    assert message.startswith("resources.gpu: a GPU can't be used: it fails; the node has ")
    assert "PyTorch for CUDA 13.0 needs driver 580 or newer" in message
    assert message.endswith(remedy)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
         "GCC version:  gcc version 11.4.0", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)",
         "570.86.15"),
        ("", None),
    ],
    ids=["closed", "open", "empty"],
)  # fmt: skip
def test_the_version_is_read_from_the_kernels_file(text: str, version: str | None) -> None:
    assert driver_version(text) == version
