"""Clusters that several processes share are started once, and removed by the first process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands in for a folder of tests that need a cluster; the cluster is a file.
_CONFTEST = """
import os, time
from pathlib import Path
from demo import clusters
from testkit import shared_clusters

HERE = Path(__file__).parent
clusters.remove = lambda name: (HERE / "removed").open("a").write(f"{name} by {os.getpid()}\\n")

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        (HERE / "first").write_text(str(os.getpid()))
        shared_clusters.begin()

def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shared_clusters.end()
"""
_TESTS = """
import os, time
import pytest
from pathlib import Path
from testkit.shared_clusters import shared

def start():
    with Path(__file__).with_name("started").open("a") as file:
        file.write("once\\n")
    time.sleep(0.5)
    {failure}
    return {{"name": "of nodes"}}

@pytest.mark.parametrize("number", range(6))
def test_it(number):
    assert shared("a", start) == {{"name": "of nodes"}}
"""


@pytest.mark.parametrize(
    ("processes", "failure", "counts"),
    [(0, "", "6 passed"), (2, "", "6 passed"), (2, "raise OSError('no disk')", "6 failed")],
    ids=["one process", "two processes", "no start"],
)
def test_a_cluster_is_started_once_and_removed_at_the_end(
    tmp_path: Path, processes: int, failure: str, counts: str
) -> None:
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    (tmp_path / "test_it.py").write_text(_TESTS.format(failure=failure))
    path = ":".join(str(ROOT / part) for part in ("hack", "tests"))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-n", str(processes), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert counts in ended.stdout, ended.stdout + ended.stderr
    assert (tmp_path / "started").read_text() == "once\n"
    assert (tmp_path / "removed").read_text() == f"a by {(tmp_path / 'first').read_text()}\n"
    if failure:
        assert ended.stdout.count("OSError: no disk") >= 1
        assert "cluster a didn't start" in ended.stdout
