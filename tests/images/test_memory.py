"""Builds use memory for temporary files only if there is plenty, and leave nothing in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from images.memory import memory_folder

_GIB = 1 << 30


@pytest.mark.parametrize(("available", "need", "is_used"), [(8, 1, True), (4, 1, False), (16, 11, False)])
def test_memory_is_used_only_if_enough_of_it_stays_available(
    tmp_path: Path, available: int, need: int, is_used: bool
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 1 kB\nMemAvailable: {available << 20} kB\n")
    assert (memory_folder(need * _GIB, tmp_path, meminfo) is not None) == is_used


def test_without_such_a_folder_none_is_used(tmp_path: Path) -> None:
    assert memory_folder(1, tmp_path / "missing") is None


def test_the_folder_of_a_dead_process_is_removed_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    (tmp_path / "finetune-operator-999999999").mkdir()
    (tmp_path / f"finetune-operator-{os.getppid()}").mkdir()
    (tmp_path / "somebody-elses").mkdir()
    folder = memory_folder(1, tmp_path)
    assert folder == tmp_path / f"finetune-operator-{os.getpid()}"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"finetune-operator-{os.getppid()}", f"finetune-operator-{os.getpid()}", "somebody-elses",
    }  # fmt: skip


def test_the_folder_is_removed_when_the_process_ends(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from images.memory import memory_folder; "
        "print(memory_folder(1, Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "hack")}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
