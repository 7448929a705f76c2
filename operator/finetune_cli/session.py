"""Starts a supervisor as a child process on this machine, follows it and stops it.

The child is the same program as in a pod; only its environment differs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_api import names
from finetune_api.messages import result
from finetune_api.messages.run import RunConfig

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Ended:
    """Holds the supervisor's exit code, and its result if it wrote one."""

    code: int
    result: result.Result | None


def follow(
    config: RunConfig,
    *,
    environment: Mapping[str, str],
    log: Path,
    tick: Callable[[], None],
    interrupted: Callable[[int], None],
) -> Ended:
    """Runs the supervisor to its end.

    Each Ctrl-C is passed on as SIGTERM; the first one saves a checkpoint. `tick` is called several
    times per second, and `interrupted` with the number of interruptions so far.
    """
    folder = log.parent
    folder.mkdir(parents=True, exist_ok=True)
    config_file, result_file = folder / "run-config.json", folder / "result.json"
    config_file.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    result_file.unlink(missing_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer"],
            env={
                **environment,
                names.ENV_RUN_CONFIG: str(config_file),
                names.ENV_TERMINATION_LOG: str(result_file),
                names.ENV_NODE_RANK: "0",
                "FINETUNE_LOG_FORMAT": "text",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_stop_with_parent,
        )
        interruptions = 0

        def interrupt(*_: object) -> None:
            """Passes a signal on to the supervisor."""
            nonlocal interruptions
            interruptions += 1
            child.send_signal(signal.SIGTERM)
            interrupted(interruptions)

        previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while child.poll() is None:
                tick()
                time.sleep(0.15)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    text = result_file.read_text() if result_file.exists() else ""
    return Ended(child.returncode, result.decode(text))


def new_lines(log: Path, offset: int) -> tuple[str, int]:
    """Returns the complete lines written to the log since `offset`, and the new offset."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return "", offset
    complete = data[: data.rfind(b"\n") + 1]
    return complete.decode(errors="replace"), offset + len(complete)


def child_environment() -> dict[str, str]:
    """Returns our environment without a launcher's variables, which would mislead the ranks."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def _stop_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
