"""Ranks by fork: one server imports once what a rank imports, and every rank of every run is a fork
of it.

Starting a rank costs milliseconds instead of the seconds of its imports. It's still a separate
process that runs `finetune_trainer.rank.main()` and can be killed. The server does nothing except
import (`preloaded_modules`), because the threads of OpenMP, autograd and gloo must start after the
fork.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

# torch, Transformers and DeepSpeed read these variables while they are imported, so a rank can't
# change them after its fork.
_IMPORT_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_ACCELERATOR": "cpu",
}
_server: ForkServerContext | None = None
_start_lock = Lock()
_exit_code_lock = Lock()  # multiprocessing reads an exit code once; threads that read it at the same time would collide


@dataclass(frozen=True)
class KillPoint:
    """A process with this point sends SIGKILL to itself just before its `nth` write operation on a
    path that contains `path`. Python's audit events are counted, such as creating a folder, opening
    a file for writing or renaming it."""

    path: str
    nth: int = 1


class Preparation(Protocol):
    """A change of a rank's process before its run starts, such as a fault."""

    def install(self) -> None: ...


class ForkedRank:
    """A running rank, with the part of subprocess.Popen's interface that tests use."""

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        scratches: Sequence[Path] = (),
        kill_point: KillPoint | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        """Starts a rank. If `scratches` is set, it does the runs of these folders in sequence (see
        `run_sequence`) instead of the environment's one."""
        arguments = (dict(environment), str(log), [str(scratch) for scratch in scratches], kill_point, preparation)
        self._process = _context().Process(target=_rank, args=arguments, daemon=True)
        with _exit_code_lock:
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs."""
        with _exit_code_lock:
            return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Returns the exit code. Raises TimeoutError if the process still runs after `timeout`
        seconds."""
        connection.wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise TimeoutError(f"rank with pid {self.pid} still runs after {timeout:.0f} s")
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def exit_code_in_a_fork(function: Callable[..., None], *arguments: Any) -> int | None:
    """Calls a function in a fork of the server and returns the exit code of its process."""
    return exit_codes_in_forks(function, [arguments])[0]


def exit_codes_in_forks(function: Callable[..., None], arguments: Sequence[Sequence[Any]]) -> list[int | None]:
    """Calls a function once for each list of arguments, at the same time, each in its own fork."""
    processes = [_context().Process(target=function, args=tuple(one_call), daemon=True) for one_call in arguments]
    for process in processes:
        with _exit_code_lock:
            process.start()
    for process in processes:
        connection.wait([process.sentinel], 60)
    with _exit_code_lock:
        return [process.exitcode for process in processes]


def start_server() -> None:
    """Starts the server, which imports while the caller does something else."""
    global _server
    if _server is not None:
        return
    root = Path(__file__).parents[3]
    environment = dict(os.environ)
    os.environ.update(
        _IMPORT_ENVIRONMENT, PYTHONPATH=":".join(str(root / p) for p in ("operator", "trainer_image", "tests"))
    )
    try:
        _server = get_context("forkserver")
        _server.set_forkserver_preload(["trainer.support.preloaded_modules"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _context() -> ForkServerContext:
    """Returns the server once it has imported, and starts it in its own environment if
    necessary."""
    with _start_lock:
        return _started_server()


@cache
def _started_server() -> ForkServerContext:
    start_server()
    assert _server is not None
    first = _server.Process(target=_check_imports)
    first.start()
    first.join()
    assert first.exitcode == 0, "the fork server lacks its imports, or has threads"
    return _server


def _check_imports() -> None:
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    assert "trainer.support.preloaded_modules" in sys.modules
    assert "\nThreads:\t1\n" in status


def _rank(
    environment: Mapping[str, str],
    log: str,
    scratches: list[str],
    kill_point: KillPoint | None,
    preparation: Preparation | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    if kill_point is not None:
        install(kill_point)
    if preparation is not None:
        preparation.install()
    if scratches:
        from trainer.support import run_sequence

        run_sequence.main(scratches)
        return
    from finetune_trainer import rank

    sys.exit(rank.main())


def install(kill_point: KillPoint) -> None:
    """Makes this process kill itself at `kill_point`. This can't be undone."""
    sys.addaudithook(_AuditHook(kill_point))


class _AuditHook:
    def __init__(self, kill_point: KillPoint) -> None:
        self._kill_point = kill_point
        self._count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WRITE_EVENTS or not any(self._kill_point.path in str(argument) for argument in arguments):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self._count += 1
        if self._count == self._kill_point.nth:
            os.kill(os.getpid(), signal.SIGKILL)


_WRITE_EVENTS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}
