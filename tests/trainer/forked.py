"""Ranks by fork: one server imports what a rank imports, once, and every rank of every run is a fork of it.

Starting a rank costs milliseconds instead of the seconds of its imports, and it's still a process of its own that runs
`finetune_trainer.rank.main()` and can be killed. The server does nothing but import (`imports.py`): OpenMP's,
autograd's and gloo's threads begin after the fork. Used by `ranks` alone.
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
from typing import Any

from trainer.faults import Fault

# What torch, Transformers and DeepSpeed read while they are imported; a rank can't change it after its fork.
_AT_IMPORT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_ACCELERATOR": "cpu",
}
_server: ForkServerContext | None = None
_starting = Lock()
_lock = Lock()  # multiprocessing reads a process's end once; threads that ask for it at once would disturb each other


@dataclass(frozen=True)
class Die:
    """SIGKILL to itself just before it does the `nth` thing to a path that contains `path`: Python's audit events, such
    as making a folder, opening a file for writing or renaming it."""

    path: str
    nth: int = 1


class Forked:
    """A running rank; the part of subprocess.Popen that tests use."""

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        scratches: Sequence[Path] = (),
        die: Die | None = None,
        fault: Fault | None = None,
    ) -> None:
        """`scratches`: do these runs one after the other (many.py) instead of the environment's one."""
        arguments = (dict(environment), str(log), [str(scratch) for scratch in scratches], die, fault)
        self._process = _context().Process(target=_rank, args=arguments, daemon=True)
        with _lock:
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        with _lock:
            return self._process.exitcode

    def wait(self, timeout: float) -> int:
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


def ended_in_a_fork(what: Callable[..., None], *arguments: Any) -> int | None:
    """How a process of its own ends that does something else than a rank."""
    return ended_in_forks(what, [arguments])[0]


def ended_in_forks(what: Callable[..., None], arguments: Sequence[Sequence[Any]]) -> list[int | None]:
    """How several end that run at the same time."""
    processes = [_context().Process(target=what, args=tuple(own), daemon=True) for own in arguments]
    for process in processes:
        with _lock:
            process.start()
    for process in processes:
        connection.wait([process.sentinel], 60)
    with _lock:
        return [process.exitcode for process in processes]


def begin() -> None:
    """Starts the server, which imports while the caller does something else."""
    global _server
    if _server is not None:
        return
    root = Path(__file__).parents[2]
    before = dict(os.environ)
    os.environ.update(_AT_IMPORT, PYTHONPATH=":".join(str(root / p) for p in ("operator", "trainer_image", "tests")))
    try:
        _server = get_context("forkserver")
        _server.set_forkserver_preload(["trainer.imports"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _context() -> ForkServerContext:
    """The server, once it has imported; started if need be, in an environment of its own."""
    with _starting:
        return _started()


@cache
def _started() -> ForkServerContext:
    begin()
    assert _server is not None
    first = _server.Process(target=_check_imports)
    first.start()
    first.join()
    assert first.exitcode == 0, "the fork server lacks its imports, or has threads"
    return _server


def _check_imports() -> None:
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    assert "trainer.imports" in sys.modules
    assert "\nThreads:\t1\n" in status


def _rank(environment: Mapping[str, str], log: str, scratches: list[str], die: Die | None, fault: Fault | None) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.clear()
    os.environ.update(environment)
    if die is not None:
        install(die)
    if fault is not None:
        fault.install()
    if scratches:
        from trainer import many

        many.main(scratches)
        return
    from finetune_trainer import rank

    sys.exit(rank.main())


def install(die: Die) -> None:
    """In this process, for good."""
    sys.addaudithook(_Hook(die))


class _Hook:
    def __init__(self, die: Die) -> None:
        self._die = die
        self._seen = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WRITING or not any(self._die.path in str(argument) for argument in arguments):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self._seen += 1
        if self._seen == self._die.nth:
            os.kill(os.getpid(), signal.SIGKILL)


_WRITING = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}
