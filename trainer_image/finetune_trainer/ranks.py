"""The ranks of this node as processes: start, watch, stop. Used by the supervisor; decides nothing about reasons.

Each rank leads its own process group, dies with the supervisor, and is the memory killer's first choice before it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.names import ENV_RUN_CONFIG
from finetune_api.run import WorldConfig
from finetune_trainer import allocator
from finetune_trainer.log import Log
from finetune_trainer.paths import Paths

RANK_COMMAND = (sys.executable, "-m", "finetune_trainer.rank")
ENV_SCRATCH = "FINETUNE_SCRATCH"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class RankSpec:
    """How one rank is started. Pure: made by `rank_specs`."""

    rank: int
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)


def rank_specs(
    world: WorldConfig, node_rank: int, paths: Paths, command: tuple[str, ...], environment: Mapping[str, str]
) -> tuple[RankSpec, ...]:
    """One spec a process of this node, with torchrun's variables."""
    first = node_rank * world.processes_per_node
    shared = {
        **environment,
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.processes_per_node),
        "GROUP_RANK": str(node_rank),
        "MASTER_ADDR": world.master_address,
        "MASTER_PORT": str(world.master_port),
        "OMP_NUM_THREADS": str(world.threads_per_process),
        ENV_SCRATCH: str(paths.scratch),
        ENV_RUN_CONFIG: str(paths.run_config),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **allocator.environment(world.device, environment),
    }
    return tuple(
        RankSpec(first + local, command, {**shared, "RANK": str(first + local), "LOCAL_RANK": str(local)})
        for local in range(world.processes_per_node)
    )


def become_subreaper() -> None:
    """Orphans of the ranks (data loader workers, compilers) come to us instead of to nobody, so `reap` sees them."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Ranks:
    """Running ranks. Not thread-safe: one loop owns it."""

    def __init__(self, specs: tuple[RankSpec, ...], paths: Paths, log: Log) -> None:
        self._log = log
        self._pumps: list[threading.Thread] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.ended: dict[int, int] = {}
        """rank → status, in the order in which the ends were seen; below 0 is a signal."""
        for spec in specs:
            self._start(spec, paths.rank_log(spec.rank))

    @property
    def alive(self) -> tuple[int, ...]:
        return tuple(rank for rank in self._processes if rank not in self.ended)

    def pid(self, rank: int) -> int:
        return self._processes[rank].pid

    def poll(self) -> tuple[int, ...]:
        """The ranks that ended since the last call. Also reaps orphans."""
        self._reap()
        new = []
        for rank in self.alive:
            status = self._processes[rank].poll()
            if status is not None:
                self.ended[rank] = status
                new.append(rank)
        return tuple(new)

    def signal(self, number: int) -> None:
        """To every living rank and its children."""
        for rank in self.alive:
            _signal_group(self._processes[rank].pid, number)

    def stop(self, patience: float) -> None:
        """SIGTERM, then SIGKILL after `patience` seconds; returns when all are gone and their output is written."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + patience
        while self.alive and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        while self.alive:
            self.poll()
            time.sleep(0.02)
        self.drain()

    def drain(self) -> None:
        """Ends what the ranks left running and waits for the rest of their output."""
        for process in self._processes.values():
            _signal_group(process.pid, signal.SIGKILL)
        for pump in self._pumps:
            pump.join(timeout=2)

    def _start(self, spec: RankSpec, log_file: Path) -> None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            spec.command,
            env=dict(spec.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # one system call, by a library that is loaded already
        )
        self._processes[spec.rank] = process
        try:
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        except OSError:
            self._log.info("can't make a rank the memory killer's first choice", rank=spec.rank)
        pump = threading.Thread(target=self._pump, args=(spec.rank, process, log_file), daemon=True)
        pump.start()
        self._pumps.append(pump)

    def _pump(self, rank: int, process: subprocess.Popen[bytes], log_file: Path) -> None:
        """A rank's output into its file and our stdout. A full disk costs the file, never the rank."""
        assert process.stdout is not None  # noqa: S101 (asked for above)
        with process.stdout as output, log_file.open("ab") as file:
            for line in output:
                try:
                    file.write(line)
                    file.flush()
                except OSError:
                    pass
                self._log.relay(rank, line.decode(errors="replace").rstrip("\r\n"))

    def _reap(self) -> None:
        """Waits for children that aren't ranks (we may be PID 1); a rank's status is left for its Popen."""
        ours = {process.pid: process for process in self._processes.values()}
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            if found.si_pid in ours:
                ours[found.si_pid].poll()
            else:
                try:
                    os.waitpid(found.si_pid, os.WNOHANG)
                except ChildProcessError:
                    return


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return
