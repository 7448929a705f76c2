"""A supervisor of this machine as a child process: start it, follow it, stop it. Called by `run`.

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

from finetune_api import names, result
from finetune_api.run import RunConfig

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Ended:
    """Exit code and last word of the supervisor."""

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
    """Runs the supervisor to its end. Each Ctrl-C is passed on as SIGTERM: the first one saves a checkpoint.

    `tick` is called several times a second, `interrupted` with the number of interruptions so far.
    """
    folder = log.parent
    folder.mkdir(parents=True, exist_ok=True)
    told, last = folder / "run-config.json", folder / "result.json"
    told.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    last.unlink(missing_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer"],
            env={
                **environment,
                names.ENV_RUN_CONFIG: str(told),
                names.ENV_TERMINATION_LOG: str(last),
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
            nonlocal interruptions
            interruptions += 1
            child.send_signal(signal.SIGTERM)
            interrupted(interruptions)

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while child.poll() is None:
                tick()
                time.sleep(0.15)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    text = last.read_text() if last.exists() else ""
    return Ended(child.returncode, result.decode(text))


def new_lines(log: Path, offset: int) -> tuple[str, int]:
    """What was written to the log since `offset`, whole lines only, and the new offset."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return "", offset
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode(errors="replace"), offset + len(whole)


def child_environment() -> dict[str, str]:
    """Ours, without what would lead the child elsewhere."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def _stop_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
