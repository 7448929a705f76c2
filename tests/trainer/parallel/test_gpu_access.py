"""A rank that can't use its GPU names the driver of the node and the one that is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fake_gpu
from finetune_api.reasons import cause
from finetune_trainer.parallel.gpu_access import Driver, driver_version, explanation

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


def _refusal(libraries: Path | None, cuda_version: str = "12040") -> str:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    environment = {
        **{name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"},
        **ranks,
        **({"LD_LIBRARY_PATH": str(libraries)} if libraries else {}),
        "FAKE_CUDA_VERSION": cuda_version,
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
