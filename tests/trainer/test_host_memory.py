"""Host memory: the C library's unused memory is released when something else needs it, and
out-of-memory kills are counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_trainer.host_memory import oom_kills
from finetune_trainer.supervisor.processes import allocator_environment

_PROGRAM = """
import numpy as np
from pathlib import Path
from finetune_trainer.host_memory import release_unused

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

parts = [np.ones(2**17) for _ in range(200)]  # 1 MiB each
rest = np.ones(2**10)  # keeps the heap's end in use
del parts
before = resident_mib()
release_unused()
print(before - resident_mib(), rest[0])
"""


def test_memory_that_was_freed_goes_back_to_the_kernel() -> None:
    variables = allocator_environment("cpu", {})
    assert variables
    out = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    assert float(out.stdout.split()[0]) > 150


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, {}),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, {}),
    ],
    ids=["default", "set", "set by the new name"],
)
def test_segments_of_a_gpus_memory_are_expandable_unless_a_variable_says_otherwise(
    environment: dict[str, str], expected: dict[str, str]
) -> None:
    assert allocator_environment("cuda", environment) == expected


@pytest.mark.parametrize(
    "text",
    ["low 0\nhigh 0\noom 3\noom_kill 2\noom_group_kill 0\n", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"],
    ids=["cgroup v2", "cgroup v1"],
)
def test_kills_for_memory_are_read_from_either_cgroup_version(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert oom_kills((tmp_path / "none", tmp_path / "file")) == 2
    assert oom_kills((tmp_path / "none",)) == 0
