"""The peers: each in an environment of its own, kept in the cache by the content of its requirements.

Called by `__main__`. Only `uv pip install` of names and versions; what runs there is `run_<peer>.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trainer import processes

from demo_assets.package import AssetError, write_once

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """What all configurations of a request have in common. Rows lie in the order in which our plan takes them."""

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
    """The interpreter of the peer's environment; made where it is missing."""
    requirements = _HERE / "requirements" / f"{peer}.txt"
    key = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]

    def make(target: Path) -> None:
        uv = shutil.which("uv")
        if uv is None:
            raise AssetError("uv isn't on PATH: `pip install uv`, it makes the peers' environments.")
        environment = target / "env"
        for command in (
            [uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, str(environment)],
            [uv, "pip", "install", "--quiet", "--python", str(environment / "bin/python"), "-r", str(requirements)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise AssetError(f"{peer} can't be installed: {done.stderr[-800:]}")

    return write_once(f"bench-peer-{peer}-{key}", make) / "env/bin/python"


def measure(peer: str, task: Task, configs: Sequence[Mapping[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """One answer a configuration, all of them in one process. Never raises for what a peer does."""
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
                    "memory": processes.room(),
                    "configs": list(configs),
                }
            )
        )
        command = [str(python(peer)), str(_HERE / f"run_{peer}.py"), str(request), str(answers)]
        environment = processes.environment(task.threads, device=task.device, keeps_memory=task.keeps_memory)
        ended = processes.run([(command, environment)], log=log, timeout=timeout, folder=Path(folder))
        told = [json.loads(line) for line in answers.read_text().splitlines()] if answers.is_file() else []
        missing = configs[len(told) :]
        why = f"the process ended with code {ended.codes[0]} after {ended.seconds:.0f} s: {processes.tail(log)}"
        told += [{"name": config["name"], "error": why} for config in missing[:1]]
        told += [{"name": config["name"], "error": "not tried: the process had ended"} for config in missing[1:]]
        for answer in told:
            answer["anonymous_bytes"] = ended.peaks[0].anonymous
        return told
