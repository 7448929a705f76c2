"""The operator's settings are read from YAML; errors name the key or the line, and never show a
traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune_operator import settings

BROKEN = {
    "not YAML": ("logLevel: [info", "line 1, column"),
    "a tab": ("leaderElection:\n\tenabled: true", "line 2, column 1"),
    "not a mapping": ("- logLevel", "Input should be an object"),
    "an unknown key": ("loglevel: info", "loglevel"),
    "a date": ("logLevel: 2026-01-01", "logLevel"),
    "a wrong type": ("leaderElection: {leaseSeconds: soon}", "leaderElection.leaseSeconds"),
}


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert settings.parse("") == settings.Settings() == settings.load(None)


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_ends_the_operator_with_a_message(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    ended = subprocess.run(
        [sys.executable, "-m", "finetune_operator", "--config", str(file)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"{file}: ")
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
