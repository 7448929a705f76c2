"""Installs the Debian programs that clusters, add-ons, images and tests need, if run as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localcluster.configs import CNI_PLUGINS
from localcluster.errors import LocalClusterError

CONTROL_PLANE = {"openssl": "openssl", "ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
NODE = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    f"{CNI_PLUGINS}/bridge": "containernetworking-plugins",
    "dnsmasq": "dnsmasq-base",
}
POLICIES = {"ipset": "ipset", "xtables-legacy-multi": "iptables"}
PROMETHEUS = {"prometheus": "prometheus"}
BUILDAH = {"buildah": "buildah"}
ALL = {
    **CONTROL_PLANE,
    **NODE,
    **POLICIES,
    **PROMETHEUS,
    "promtool": "prometheus",
    **BUILDAH,
    "debootstrap": "debootstrap",
}
_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = "#!/bin/sh\n# written by localcluster while it installs packages: start no service\nexit 101\n"


def missing(programs: dict[str, str]) -> list[str]:
    """Returns the Debian packages of those programs (program to package) that aren't on PATH."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    lacking = {package for program, package in programs.items() if not shutil.which(program, path=search)}
    return sorted(lacking)


def ensure(programs: dict[str, str]) -> None:
    """Installs what is missing, without starting any of its services.

    Raises LocalClusterError if it may not install or apt-get fails.
    """
    packages = missing(programs)
    if not packages:
        return
    remedy = f"install them: apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LocalClusterError(f"missing Debian packages {', '.join(packages)}; {remedy}")
    print(f"localcluster: installing {', '.join(packages)}", file=sys.stderr)
    with _no_services():
        if _apt("install", "--yes", "--no-install-recommends", *packages).returncode:
            _apt("update")
            again = _apt("install", "--yes", "--no-install-recommends", *packages)
            if again.returncode:
                lines = (again.stderr or again.stdout).strip().splitlines() or ["no output"]
                raise LocalClusterError(f"apt-get can't install {', '.join(packages)}: {lines[-1]}; {remedy}")
    if still := missing(programs):
        raise LocalClusterError(f"installed {', '.join(packages)}, but {', '.join(still)} still lacks its program")


def _apt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )


@contextmanager
def _no_services() -> Iterator[None]:
    """Keeps Debian from starting a package's services while the body runs.

    Debian asks /usr/sbin/policy-rc.d; if the machine has its own, that one is left alone.
    """
    ours = not _POLICY.exists() or _POLICY.read_text() == _POLICY_TEXT
    if ours:
        _POLICY.write_text(_POLICY_TEXT)
        _POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            _POLICY.unlink(missing_ok=True)
