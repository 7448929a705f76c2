"""Fixtures for the tests of hack/localcluster: a static busybox as an image, and a snapshot of the
host's state."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from localcluster import sandbox
from localcluster.network import host_interface
from localcluster.paths import cluster_paths
from testkit.busybox import busybox_archive

HOST_FOLDERS = ("/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/var/log/containers", "/run/netns")
HOST_SETTINGS = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward")


@dataclass(frozen=True)
class Host:
    """What a cluster leaves visible on the host. If it is equal before and after, nothing was left
    behind."""

    processes: tuple[str, ...]
    mounts: tuple[str, ...]
    interface: bool
    routes: tuple[str, ...]
    cgroups: tuple[str, ...]
    firewall: str
    folders: tuple[str, ...]
    settings: tuple[str, ...]


@pytest.fixture
def host() -> Callable[[str], Host]:
    """Returns a function that reads what belongs to the cluster of a name on this machine."""
    return _host


def _host(name: str) -> Host:
    root = str(cluster_paths(name).root)
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout.splitlines()
    save = shutil.which("iptables-save")
    return Host(
        processes=tuple(_processes_naming(f"{root}/")),
        mounts=tuple(line for line in table if root in line),
        interface=Path(f"/sys/class/net/{host_interface(name)}").exists(),
        routes=tuple(line for line in routes if host_interface(name) in line),
        cgroups=tuple(map(str, Path("/sys/fs/cgroup").glob(f"**/{sandbox.cgroup_name(name)}*"))),
        firewall=subprocess.run([save], capture_output=True, text=True, check=True).stdout if save else "",
        folders=tuple(folder for folder in HOST_FOLDERS if Path(folder).exists()),
        settings=tuple(Path("/proc/sys", setting).read_text() for setting in HOST_SETTINGS),
    )


def _processes_naming(text: str) -> Iterator[str]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                yield line


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI archive of Debian's static busybox, which is used as a workload."""
    return busybox_archive(tmp_path_factory.mktemp("busybox"))
