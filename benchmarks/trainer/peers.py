"""Runs the peers, each in its own environment, which is cached by the content of its requirements.

An environment contains only what `uv pip install` puts there; it runs `run_<peer>.py`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trainer import processes

from demo_assets.package import AssetError, write_once
from images.cache import uv_program

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """What all configurations of a request have in common.

    Rows are in the order of our batch plan. `keeps_memory` sets our supervisor's allocator
    settings, too.
    """

    model: Path
    rows: Sequence[Mapping[str, str]]
    global_batch: int
    longest: int
    learning_rate: float
    dropout: float
    device: str
    threads: int
    keeps_memory: bool = False


def python(peer: str) -> Path:
    """Returns the interpreter of the peer's environment, created if it is missing.

    Raises AssetError if the packages can't be installed.
    """
    requirements = _HERE / "requirements" / f"{peer}.txt"
    key = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]

    def make(target: Path) -> None:
        uv = uv_program()
        if uv is None:
            raise AssetError(
                "the peers' environments need uv, which isn't on PATH: run `make venv`, which installs it."
            )
        environment = target / "env"
        for command in (
            [str(uv), "venv", "--quiet", "--relocatable", "--python", sys.executable, str(environment)],
            [
                str(uv),
                "pip",
                "install",
                "--quiet",
                "--python",
                str(environment / "bin/python"),
                "-r",
                str(requirements),
            ],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise AssetError(f"{peer} can't be installed: {done.stderr[-800:]}")

    return write_once(f"bench-peer-{peer}-{key}", make) / "env/bin/python"


def measure(peer: str, task: Task, configs: Sequence[Mapping[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """Measures the configurations in one process; returns one answer for each.

    A peer's failure becomes an answer with `error`, not an exception.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answers, log = (Path(folder) / name for name in ("request.json", "answers.jsonl", "log"))
        request.write_text(
            json.dumps(
                {
                    "model": str(task.model),
                    "rows": list(task.rows),
                    "global_batch": task.global_batch,
                    "longest": task.longest,
                    "learning_rate": task.learning_rate,
                    "dropout": task.dropout,
                    "device": task.device,
                    "memory": processes.memory_limit(),
                    "configs": list(configs),
                }
            )
        )
        command = [str(python(peer)), str(_HERE / f"run_{peer}.py"), str(request), str(answers)]
        environment = processes.environment(task.threads, device=task.device, keeps_memory=task.keeps_memory)
        ended = processes.run([(command, environment)], log=log, timeout=timeout, folder=Path(folder))
        answers_of_peer = [json.loads(line) for line in answers.read_text().splitlines()] if answers.is_file() else []
        missing = configs[len(answers_of_peer) :]
        reason = f"the process ended with code {ended.codes[0]} after {ended.seconds:.0f} s: {processes.tail(log)}"
        answers_of_peer += [{"name": config["name"], "error": reason} for config in missing[:1]]
        answers_of_peer += [
            {"name": config["name"], "error": "not measured, since the process had ended"} for config in missing[1:]
        ]
        for answer in answers_of_peer:
            answer["anonymous_bytes"] = ended.peaks[0].anonymous
        return answers_of_peer
