"""Every change of `mutants` still fits the sources that it breaks, so `make broken` doesn't end
with "stale"."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.support.mutants import ALL, Mutant

_SOURCES = Path(__file__).parents[2] / "trainer_image" / "finetune_trainer"


@pytest.mark.parametrize("mutant", ALL, ids=[f"{mutant.number}: {mutant.what}" for mutant in ALL])
def test_a_bug_can_be_put_back(mutant: Mutant, tmp_path: Path) -> None:
    for file, original, replacement in mutant.edits:
        text = (_SOURCES / file).read_text()
        assert text.count(original) == 1, f"{file} contains it {text.count(original)} times: {original}"
        (tmp_path / "mutant.py").write_text(text.replace(original, replacement))
        command = [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--select",
            "F821,E9",
            str(tmp_path / "mutant.py"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
