"""Creates, enters and removes a cluster's namespaces, from the host's side.

Everything can be identified from the cluster's folder alone (a process's arguments, an interface's
name, a cgroup's name), so `down` works after a crash at any line of `up`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from localcluster.components import Component
from localcluster.errors import LocalClusterError
from localcluster.network import Network, host_interface
from localcluster.paths import PACKAGE, ClusterPaths

_INIT = "localcluster.init"
_CGROUPS = Path("/sys/fs/cgroup")


def processes(root: Path) -> list[int]:
    """Returns the ids of the processes that keep the namespaces alive: `unshare` and process 1."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                argv = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if _INIT.encode() in argv and os.fsencode(root) in argv:
                pids.append(int(folder.name))
    return sorted(pids)


def init_pid(root: Path) -> int | None:
    """Returns the host's id of process 1 of the namespaces, None if there is none."""
    for pid in processes(root):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        numbers = next((line.split() for line in status.splitlines() if line.startswith("NSpid:")), [])
        if len(numbers) > 2 and numbers[-1] == "1":
            return pid
    return None


def start(paths: ClusterPaths, network: Network) -> int:
    """Creates the cluster's namespaces and its veth pair; returns the id of their process 1.

    Raises LocalClusterError if process 1 doesn't start.
    """
    pid = start_namespaces(paths)
    _connect(pid, network)
    return pid


def start_namespaces(paths: ClusterPaths) -> int:
    """Creates namespaces without a network; returns the host's id of their process 1.

    Raises LocalClusterError if process 1 doesn't start.
    """
    for folder in (paths.run, paths.data, paths.logs, paths.etc):
        folder.mkdir(parents=True, exist_ok=True)
    paths.run.chmod(0o700)
    log = (paths.logs / "init.log").open("ab")
    namespaces = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
    with log:
        holder = subprocess.Popen(
            ["unshare", *namespaces, "--propagation", "slave", "--", sys.executable, "-m", _INIT, str(paths.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        )
    deadline = time.monotonic() + 10
    while not (paths.run / "control").exists():
        if time.monotonic() > deadline or holder.poll() is not None:
            raise LocalClusterError(
                f"the cluster's namespaces did not start: {_tail(paths.logs / 'init.log')}; "
                "this needs root with permission to create network, mount and process namespaces"
            )
        time.sleep(0.02)
    pid = init_pid(paths.root)
    if pid is None:
        raise LocalClusterError(f"the cluster's process 1 ended: {_tail(paths.logs / 'init.log')}")
    return pid


def _connect(pid: int, network: Network) -> None:
    host = network.host_interface
    _run("ip", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    inside = (
        "link set lo up",
        f"addr add {network.node_address}/30 dev eth0",
        "link set eth0 up",
        f"route add default via {network.host_address}",
    )
    configure_network(pid, inside)
    outside = (
        f"addr add {network.host_address}/30 dev {host}",
        f"link set {host} up",
        f"route add {network.block} via {network.node_address}",
    )
    _run("ip", "-batch", "-", stdin="\n".join(outside))


def link(pid: int, interface: str, other: int) -> None:
    """Connects the namespaces of two processes: `interface` in the first, `eth0` in the other.

    An interface of the same name, whose other end the kernel hasn't released yet, is replaced.
    """
    subprocess.run([*enter(pid), "ip", "link", "delete", interface], capture_output=True, check=False)
    _run("ip", "link", "add", interface, "netns", str(pid), "type", "veth", "peer", "name", "eth0", "netns", str(other))


def configure_network(pid: int, lines: Iterable[str]) -> None:
    """Runs ip(8) with these lines in the namespaces of `pid`. Raises LocalClusterError."""
    _run(*enter(pid), "ip", "-batch", "-", stdin="\n".join(lines))


def routes_in_use() -> list[str]:
    """Returns the CIDRs that this machine already routes, without the default route."""
    answer = json.loads(_run("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
    return [route["dst"] for route in answer if route["dst"] != "default"]


def enter(pid: int) -> list[str]:
    """Returns the command prefix that runs a command inside the namespaces of `pid`."""
    return ["nsenter", "--target", str(pid), "--mount", "--net", "--pid", "--ipc", "--uts", "--"]


def ask(paths: ClusterPaths, request: dict[str, Any]) -> dict[str, Any]:
    """Sends one request to process 1. Raises LocalClusterError if it refuses or isn't running."""
    folder = os.open(paths.run, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(f"/proc/self/fd/{folder}/control")
            with connection.makefile("rw") as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                answer: dict[str, Any] = json.loads(stream.readline() or "{}")
    except OSError as error:
        raise LocalClusterError(f"cluster {paths.root.name!r} does not answer: {error}; run `up`") from error
    finally:
        os.close(folder)
    if not answer.get("ok"):
        raise LocalClusterError(answer.get("error", f"cluster {paths.root.name!r} refused {request['op']}"))
    return answer


def launch(paths: ClusterPaths, component: Component) -> None:
    """Has process 1 start a component and keep it running."""
    ask(
        paths,
        {"op": "start", "name": component.name, "argv": list(component.argv), "env": dict(component.env)},
    )


def stop(paths: ClusterPaths, name: str) -> None:
    """Stops a component permanently and waits until it has ended."""
    ask(paths, {"op": "stop", "name": name})

    def ended() -> bool:
        return not any(s["name"] == name and s["pid"] for s in ask(paths, {"op": "list"})["services"])

    _wait_until(ended, f"{name} has not ended")


def cgroup_name(name: str) -> str:
    return f"localcluster-{name}"


def _hierarchies() -> Iterator[Path]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] in ("cgroup", "cgroup2"):
            yield Path(before.split()[4])


def make_cgroups(name: str) -> None:
    """Creates the parent cgroup of the pods in every hierarchy that this machine mounts."""
    for hierarchy in _hierarchies():
        if (hierarchy / "cgroup.subtree_control").exists():
            _delegate(hierarchy)
        group = hierarchy / cgroup_name(name)
        group.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):
            if (group / setting).exists() and (hierarchy / setting).exists():
                (group / setting).write_text((hierarchy / setting).read_text())
        if (group / "cgroup.subtree_control").exists():
            _delegate(group)


def _delegate(group: Path) -> None:
    for controller in (group / "cgroup.controllers").read_text().split():
        try:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            continue  # this controller can't be delegated, so pods run without it


def destroy(paths: ClusterPaths, name: str) -> None:
    """Ends every process of the cluster, and removes its cgroups and its running state.

    The kernel then drops mounts and interfaces. Raises LocalClusterError if something remains.
    """
    for folder in paths.nodes.glob("[0-9]*"):
        destroy_node(ClusterPaths(folder), f"{name}.{folder.name}")
    destroy_node(paths, name)
    interface = host_interface(name)
    if Path(f"/sys/class/net/{interface}").exists():
        subprocess.run(["ip", "link", "delete", interface], capture_output=True, check=False)


def destroy_node(paths: ClusterPaths, cgroup: str) -> None:
    """Ends every process of a node, and removes its cgroups and its running state."""
    end_node(paths, cgroup)
    for folder in (paths.run, paths.data):
        _wait_until(partial(remove_tree, folder), f"{folder} can't be removed")


def end_node(paths: ClusterPaths, cgroup: str) -> None:
    """Ends every process of a node, as if its power failed, and removes its cgroups."""
    for pid in processes(paths.root):
        _kill(pid)
    _wait_until(lambda: not processes(paths.root), "processes of the cluster are still there")
    _wait_until(lambda: _remove_cgroups(cgroup), "cgroups of the cluster are still busy")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _remove_cgroups(name: str) -> bool:
    gone = True
    for hierarchy in _hierarchies():
        top = hierarchy / cgroup_name(name)
        for folder, _, _ in os.walk(top, topdown=False):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                continue
            except OSError:
                gone = False
    return gone


def remove_tree(folder: Path) -> bool:
    """Removes a folder; returns whether it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _wait_until(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 15
    while not done():
        if time.monotonic() > deadline:
            raise LocalClusterError(f"{otherwise} after 15 s; run `down` again")
        time.sleep(0.03)


def _run(*argv: str, stdin: str = "") -> str:
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LocalClusterError(f"{argv[0]} is missing; install Debian's iproute2 and util-linux") from None
    if done.returncode:
        raise LocalClusterError(f"`{' '.join(argv)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "no output"
