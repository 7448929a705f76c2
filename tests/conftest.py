"""Shared by all tests: one control plane for the full session, for everything marked `cluster`.

`FINETUNE_TEST_CLUSTER=name` uses a running cluster (`python3 -m localcluster up --name name ...`)
and keeps it; otherwise one is created when the first test needs it, and removed at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from testkit import shared_clusters

ROOT = Path(__file__).parents[1]


# Modules that took longer than 24 s in all on two busy cores; `make test-fast` leaves them out.
_SLOW = (
    "benchmarks/test_gpu_check.py",
    "cli/test_run.py",
    "trainer/checkpoint/test_kill_anywhere.py",
    "trainer/checkpoint/test_sharded.py",
    "trainer/kernels/test_attention_options.py",
    "trainer/model/test_compilation.py",
    "trainer/parallel/test_hybrid_sharding.py",
    "trainer/parallel/test_memory_of_a_step.py",
    "trainer/parallel/test_mixed_precision.py",
    "trainer/reporting/test_trackers.py",
    "trainer/storage/test_jobs_on_clouds.py",
    "trainer/storage/test_s3.py",
    "trainer/supervisor/test_failures.py",
    "trainer/supervisor/test_hang_report.py",
    "trainer/supervisor/test_shard_markers.py",
    "trainer/supervisor/test_signals.py",
    "trainer/supervisor/test_slow_disk.py",
    "trainer/training/test_anomalies.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow modules."""
    folder = Path(__file__).parent
    slow = {folder / name for name in _SLOW}
    for item in items:
        if item.path in slow:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """The first process, not one that pytest-xdist started, decides how long clusters live."""
    if not hasattr(config, "workerinput"):
        shared_clusters.begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shared_clusters.end()


@dataclass(frozen=True)
class ControlPlane:
    """A real API server with etcd, controller manager and scheduler."""

    name: str
    kubeconfig: Path
    audit_log: Path | None

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Return kubectl's standard output. If it fails, raises CalledProcessError, or with
        check=False returns its standard error too."""
        command = [localcluster_tool("kubectl"), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=stdin, text=True, capture_output=True, timeout=120)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr}")
        return done.stdout + ("" if check else done.stderr)


def localcluster(*arguments: str, timeout: float = 3600) -> str:
    """Return the standard output of the local cluster's command line.

    On a busy machine, the first start takes more than 20 minutes, since it builds Kubernetes.
    """
    done = subprocess.run(
        [sys.executable, "-m", "localcluster", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "hack")},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        timeout=timeout,
    )
    if done.returncode:
        raise AssertionError(f"localcluster {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


_TOOLS: dict[str, str] = {}


def localcluster_tool(name: str) -> str:
    """Return the path of kubectl, helm and so on, which are built on first use."""
    if name not in _TOOLS:
        _TOOLS[name] = localcluster("tool", name).strip().splitlines()[-1]
    return _TOOLS[name]


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """The session's control plane. It has no node: pods stay Pending unless a test plays the
    kubelet."""
    running = os.environ.get("FINETUNE_TEST_CLUSTER")
    name = running or f"test-{os.getpid()}"
    try:
        if not running:
            localcluster("up", "--name", name, "--control-plane-only", "--audit")
        state = json.loads(localcluster("status", "--name", name, "--json"))
        audit = state.get("auditLog")
        yield ControlPlane(name, Path(state["kubeconfig"]), Path(audit) if audit else None)
    finally:
        if not running:
            localcluster("down", "--name", name)


@pytest.fixture(scope="session")
def kubeconfig(control_plane: ControlPlane) -> Path:
    return control_plane.kubeconfig


@pytest.fixture(scope="session")
def crd(control_plane: ControlPlane) -> ControlPlane:
    """The control plane, with the committed CRD established."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    _wait_until_established(control_plane)
    control_plane.kubectl("api-resources", "--api-group=finetune-operator.io")  # this refreshes what kubectl has cached
    return control_plane


def _wait_until_established(control_plane: ControlPlane, seconds: float = 30) -> None:
    """Waits for the condition, even if the CRD has no conditions yet: kubectl wait fails then."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(ROOT / "crds"))
        except AssertionError as error:
            if "accessor error" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="session")
def helm() -> str:
    """The path of the real helm."""
    return localcluster_tool("helm")
