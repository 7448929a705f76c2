"""Process 1 of a cluster's namespaces: it keeps components running and reaps orphaned processes.

It hides the host's state folders from them. It is started inside `unshare` and controlled over a
Unix socket, one JSON object per line. When it is killed, the kernel ends every process and drops
every mount and interface of the cluster, so nothing has to be cleaned up.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESTART_SECONDS = 1.0
# The kubelet sets these kernel-wide; here it sets copies, and the host's values stay unchanged.
_SHIELDED = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)


@dataclass
class Service:
    """A component's state. `pid` 0 means that it isn't running.

    `due` is the time (time.monotonic) of its next start.
    """

    name: str
    argv: list[str]
    env: dict[str, str]
    pid: int = 0
    restarts: int = 0
    due: float = 0.0
    should_run: bool = True
    exits: list[int] = field(default_factory=list)


def mount(*arguments: str | Path) -> None:
    """Runs mount(8). Raises CalledProcessError."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


def isolate(root: Path) -> None:
    """Mounts private copies of /run, /var/lib, /var/log and of the kernel settings in _SHIELDED."""
    mount("--make-rshared", "/")
    mount("-t", "tmpfs", "-o", "mode=0755", "localcluster", "/run")
    for hidden in ("lib", "log"):
        own = root / "data" / f"var-{hidden}"
        own.mkdir(parents=True, exist_ok=True)
        mount("--bind", own, f"/var/{hidden}")
    for setting in _SHIELDED:
        real = Path("/proc/sys") / setting
        if real.exists():
            copy = Path("/run/sysctl") / setting
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(real.read_bytes())
            mount("--bind", copy, real)
    for setting in ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"):
        knob = Path("/proc/sys") / setting
        if knob.exists():
            knob.write_text("1")


def launch(service: Service, logs: Path) -> None:
    """Starts the component in its own session, with its output in the log NAME.log."""
    log = os.open(logs / f"{service.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            os.execvpe(service.argv[0], service.argv, {**os.environ, **service.env})
        except OSError as error:
            os.write(2, f"localcluster: cannot start {service.argv[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)
    os.close(log)
    service.pid = child


class Init:
    """The event loop: it serves commands, reaps children that ended and starts due components."""

    def __init__(self, root: Path) -> None:
        self.logs = root / "logs"
        self.services: dict[str, Service] = {}
        self.selector = selectors.DefaultSelector()

    def run(self, listener: socket.socket, wakeup: socket.socket) -> None:
        """Loops forever. `wakeup` becomes readable when a child ends."""
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(wakeup, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select(self.seconds_to_next_start()):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(2)
                        self.serve(connection)
                else:
                    wakeup.recv(4096)
            self.reap()
            self.start_due()

    def serve(self, connection: socket.socket) -> None:
        """Reads one request and writes its answer."""
        try:
            with connection.makefile("rw") as stream:
                answer = self.answer(json.loads(stream.readline()))
                stream.write(json.dumps(answer) + "\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"localcluster init: bad request: {error!r}", file=sys.stderr, flush=True)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carries out a request: `op` is start, list, stop or restart."""
        operation = request["op"]
        if operation == "start":
            service = Service(request["name"], request["argv"], request.get("env", {}))
            self.services[service.name] = service
            return {"ok": True}
        if operation == "list":
            return {
                "ok": True,
                "services": [
                    {"name": s.name, "pid": s.pid, "restarts": s.restarts, "exits": s.exits[-3:]}
                    for s in self.services.values()
                ],
            }
        service = self.services.get(request["name"])  # type: ignore[assignment]
        if service is None:
            return {"ok": False, "error": f"no component {request['name']!r}; running: {', '.join(self.services)}"}
        service.should_run = operation == "restart"
        if service.pid:
            os.killpg(service.pid, request.get("signal", signal.SIGTERM))
        return {"ok": True, "pid": service.pid}

    def seconds_to_next_start(self) -> float | None:
        """Returns how long to wait until a component is due, None if none is."""
        waits = [s.due - time.monotonic() for s in self.services.values() if s.should_run and not s.pid]
        return max(0.0, min(waits)) if waits else None

    def start_due(self) -> None:
        """Starts every component that should run, doesn't, and is due."""
        for service in self.services.values():
            if service.should_run and not service.pid and service.due <= time.monotonic():
                launch(service, self.logs)

    def reap(self) -> None:
        """Collects ended children, and schedules the restart of those that are components."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for service in self.services.values():
                if service.pid == pid:
                    service.pid = 0
                    service.restarts += 1
                    service.exits.append(os.waitstatus_to_exitcode(status))
                    service.due = time.monotonic() + RESTART_SECONDS


def main(root: Path) -> None:
    """Isolates this process, then serves commands on the socket `root`/run/control."""
    isolate(root)
    reader, writer = socket.socketpair()
    for end in (reader, writer):
        end.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(root / "run")  # a Unix socket's path is limited to 108 bytes, so bind a relative one
    listener.bind("control")
    listener.listen(16)
    os.chdir("/")
    Init(root).run(listener, reader)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
