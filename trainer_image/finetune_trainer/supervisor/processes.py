"""Starts, polls and stops the ranks of this node as processes. It never judges why one ended.

Each rank leads its own process group, dies with the supervisor, and is killed before the supervisor
if the container runs out of memory.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.messages.run import WorldConfig
from finetune_api.names import ENV_RUN_CONFIG
from finetune_trainer.log import Log
from finetune_trainer.paths import Paths

RANK_COMMAND = (sys.executable, "-m", "finetune_trainer.rank")
ENV_SCRATCH = "FINETUNE_SCRATCH"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36  # of prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)

_GPU_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the first name wins
_ALLOCATOR_VARIABLE = "GLIBC_TUNABLES"
_UNREACHED_BYTES = 2**40  # a threshold that is never reached
_ALLOCATOR_TUNABLES = {
    "glibc.malloc.hugetlb": 1,  # madvise(MADV_HUGEPAGE)
    "glibc.malloc.mmap_threshold": _UNREACHED_BYTES,
    "glibc.malloc.trim_threshold": _UNREACHED_BYTES,
    "glibc.malloc.top_pad": 2**26,
}


@dataclass(frozen=True)
class RankSpec:
    """Describes how to start one rank."""

    rank: int
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)


def allocator_environment(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variable that suits the allocator of a rank to training; empty if it is set.

    On a CPU, it makes the C library retain freed memory. A training step allocates and frees
    hundreds of tensors of some MiB each. By default glibc returns that memory to the kernel
    immediately and asks for it again, and every page is zeroed and mapped anew, which costs about a
    tenth of a step. With the variable, memory is retained up to the peak of what was in use, and
    huge pages are used if the kernel offers them.

    On a GPU, it makes PyTorch's segments expandable. Packed rows differ in length from step to
    step, so blocks of fixed size would be left unused between them.
    """
    if device == "cpu":
        tunables = ":".join(f"{name}={value}" for name, value in _ALLOCATOR_TUNABLES.items())
        return {} if _ALLOCATOR_VARIABLE in environment else {_ALLOCATOR_VARIABLE: tunables}
    if any(name in environment for name in _GPU_ALLOCATOR_VARIABLES):
        return {}
    return {_GPU_ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}


def rank_specs(
    world: WorldConfig, node_rank: int, paths: Paths, command: tuple[str, ...], environment: Mapping[str, str]
) -> tuple[RankSpec, ...]:
    """Returns one spec for each rank of this node, with torchrun's environment variables."""
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
        "PYTHONSAFEPATH": "1",  # no module from the working directory
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **allocator_environment(world.device, environment),
        **_flight_recorder_environment(environment),
        **_gpu_order_environment(world.device, environment),
    }
    return tuple(
        RankSpec(
            rank,
            command,
            {
                **shared,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank - first),
                **_nccl_log_environment(world, paths.nccl_log(rank), environment),
            },
        )
        for rank in range(first, first + world.processes_per_node)
    )


def _gpu_order_environment(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variable by which CUDA counts a pod's GPUs in NVML's order instead of the fastest
    first, so that rank n of a node computes on the GPU with the index n, unless it is set."""
    name = "CUDA_DEVICE_ORDER"
    return {} if device == "cpu" or name in environment else {name: "PCI_BUS_ID"}


def _flight_recorder_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variable that makes PyTorch remember the last collectives, unless one is set."""
    variables = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # since PyTorch 2.9, and before
    return {} if any(name in environment for name in variables) else {variables[0]: "2000"}


def _nccl_log_environment(world: WorldConfig, log: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables by which NCCL logs what it uses between nodes to a file of its own,
    unless one of NCCL's variables for logging is set."""
    if world.device != "cuda" or world.nodes < 2 or any(name.startswith("NCCL_DEBUG") for name in environment):
        return {}
    return {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(log)}


def become_subreaper() -> None:
    """Makes orphans of the ranks (data loader workers, compilers) children of this process, so that
    they can be reaped."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def hide_from_ranks() -> None:
    """Keeps processes of the same user from tracing this one, and from reading its memory, its
    environment and its open files. It doesn't extend to programs that this process starts, but
    those leave no memory in a core file on the node, either."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class RankProcesses:
    """Owns the running ranks. It isn't thread-safe: one loop uses it."""

    def __init__(self, specs: tuple[RankSpec, ...], paths: Paths, log: Log) -> None:
        self._log = log
        self._pumps: list[threading.Thread] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.ended: dict[int, int] = {}
        """Maps a rank to its exit status, in the order in which the ends were noticed. A status
        below 0 is a signal."""
        for spec in specs:
            self._start(spec, paths.rank_log(spec.rank))

    @property
    def alive(self) -> tuple[int, ...]:
        """The ranks that haven't ended."""
        return tuple(rank for rank in self._processes if rank not in self.ended)

    def poll(self) -> None:
        """Updates `ended`, and reaps orphans."""
        self._reap()
        for rank in self.alive:
            status = self._processes[rank].poll()
            if status is not None:
                self.ended[rank] = status

    def signal(self, number: int) -> None:
        """Sends a signal to every rank that is alive, and to its children."""
        for rank in self.alive:
            _signal_group(self._processes[rank].pid, number)

    def stop(self, timeout: float) -> None:
        """Sends SIGTERM, then SIGKILL after `timeout` seconds.

        Returns when all ranks have ended and their output is written.
        """
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while self.alive and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        while self.alive:
            self.poll()
            time.sleep(0.02)
        self.drain()

    def drain(self) -> None:
        """Kills what the ranks left running and waits for the rest of their output."""
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
            preexec_fn=die_with_parent,  # safe after a fork: one system call, by a loaded library
        )
        self._processes[spec.rank] = process
        try:
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        except OSError:
            self._log.info("can't make a rank the OOM killer's first choice", rank=spec.rank)
        pump = threading.Thread(target=self._pump, args=(spec.rank, process, log_file), daemon=True)
        pump.start()
        self._pumps.append(pump)

    def _pump(self, rank: int, process: subprocess.Popen[bytes], log_file: Path) -> None:
        """Copies a rank's output to its file and the log. On a full disk, the file lacks lines."""
        assert process.stdout is not None  # noqa: S101 (it is a pipe)
        with process.stdout as output, log_file.open("ab") as file:
            for line in output:
                try:
                    file.write(line)
                    file.flush()
                except OSError:
                    pass
                self._log.relay(rank, line.decode(errors="replace").rstrip("\r\n"))

    def _reap(self) -> None:
        """Waits for children that aren't ranks, as PID 1 must. A Popen waits for each rank."""
        ranks = {process.pid: process for process in self._processes.values()}
        while True:
            try:
                child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if child is None:
                return
            if child.si_pid in ranks:
                ranks[child.si_pid].poll()
            else:
                try:
                    os.waitpid(child.si_pid, os.WNOHANG)
                except ChildProcessError:
                    return


def die_with_parent() -> None:
    """Makes this process end with the thread that started it. It is for a child, before exec."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return
