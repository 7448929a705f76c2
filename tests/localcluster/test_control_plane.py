"""The control plane and its removal on a real machine: what starts and what is left, also after a
crash halfway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import localcluster
from localcluster import LocalClusterError, cluster
from localcluster.api import Api
from localcluster.cli import describe
from localcluster.paths import PACKAGE, cluster_paths

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster needs root"),
]
NAME = f"lc-{os.getpid()}"


def test_two_clusters_run_side_by_side_and_leave_nothing(host: Callable[[str], Any]) -> None:
    names = (f"{NAME}-a", f"{NAME}-b")
    before = [host(name) for name in names]
    made = [localcluster.up(name, control_plane_only=True, audit=True) for name in names]
    try:
        assert made[0].server != made[1].server
        for one in made:
            one.kubectl("create", "configmap", "mark", f"--from-literal=of={one.name}")
        for one in made:
            assert one.kubectl("get", "configmap", "mark", "-o", "jsonpath={.data.of}") == one.name
        assert localcluster.up(names[0], control_plane_only=True) == made[0]
        with pytest.raises(LocalClusterError, match=r"up with other options \(.*control plane only"):
            localcluster.up(names[0])
        assert made[0].audit_log is not None
        writes = [json.loads(line) for line in made[0].audit_log.read_text().splitlines()]
        assert [w["verb"] for w in writes if w.get("objectRef", {}).get("name") == "mark"][:1] == ["create"]
    finally:
        for one in made:
            one.down()
    assert [host(name) for name in names] == before
    assert [describe(name)["state"] for name in names] == ["absent", "absent"]


def test_a_killed_api_server_comes_back_with_its_objects() -> None:
    made = localcluster.up(NAME, control_plane_only=True)
    try:
        made.kubectl("create", "configmap", "kept")
        api = Api(made.server, cluster_paths(NAME).pki)
        made.restart("kube-apiserver", kill=True)
        _until(lambda: any(s["restarts"] for s in cluster.component_states(NAME)))
        _until(lambda: api.answers("/readyz"))
        assert made.kubectl("get", "configmap", "kept", "-o", "name").strip() == "configmap/kept"
        assert describe(NAME)["state"] == "running"
        with pytest.raises(LocalClusterError, match=r"no component 'kublet'; running: etcd"):
            made.restart("kublet")
    finally:
        made.down()


@pytest.mark.parametrize("seconds", [0.15, 0.4, 1.0, 2.0])
@pytest.mark.parametrize("options", [("--control-plane-only",), ("--addons", "s3")], ids=["control plane", "node"])
def test_down_cleans_up_after_an_up_that_was_killed(
    host: Callable[[str], Any], options: tuple[str, ...], seconds: float
) -> None:
    before = host(NAME)
    up = _command("up", "--name", NAME, *options)
    time.sleep(seconds)
    os.kill(up.pid, signal.SIGKILL)
    up.wait()
    assert _command("down", "--name", NAME, "--purge").wait() == 0
    assert host(NAME) == before
    assert not cluster_paths(NAME).root.exists()


def test_up_starts_from_scratch_after_an_up_that_was_killed() -> None:
    up = _command("up", "--name", NAME, "--control-plane-only")
    _until(lambda: (cluster_paths(NAME).run / "control").exists())
    up.kill()
    up.wait()
    made = localcluster.up(NAME, control_plane_only=True)
    assert "default" in made.kubectl("get", "namespaces")
    made.down()


def test_down_without_a_cluster_is_not_an_error() -> None:
    assert _command("down", "--name", f"{NAME}-never").wait() == 0


def test_a_failing_start_is_reported_with_the_components_own_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "localcluster", "up", "--name", NAME, "--control-plane-only"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "FINETUNE_CACHE": "/proc/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "set FINETUNE_CACHE to a writable folder" in done.stderr
    assert "Traceback" not in done.stderr


def _command(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "localcluster", *arguments],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _until(done: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    assert callable(done)
    while not done():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
