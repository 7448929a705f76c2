"""Tests the supervisor with a rank on the GPU.

The rank writes its stacks on request, a stalled rank is detected, and the GPU's memory is free
after a kill.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu import child, kit, running
from benchmarks.gpu.kit import Recipe

from finetune_api import names
from finetune_api.messages.run import Location, parse
from finetune_trainer.paths import Paths
from finetune_trainer.reporting import flight_records
from finetune_trainer.reporting.gpus.watch import Gpus
from testkit.rows import pairs

_STALL_SECONDS = 30
_FREE_BYTES = 300 << 20  # tolerance for other processes on the same GPU


def run(stage: child.Stage) -> None:
    with TemporaryDirectory(dir=running.scratch_root(stage.setting.device)) as name:
        root = Path(name)
        before = _used()
        with stage.guarded("supervisor"):
            pod = _start(stage, root)
            try:
                _watch(stage, pod, before)
            finally:
                pod.process.kill()
                pod.process.wait()


@dataclass(frozen=True)
class Pod:
    """A running supervisor, and the files that it and its rank write."""

    process: subprocess.Popen[bytes]
    paths: Paths
    result: Path
    log: Path

    def steps(self) -> int:
        """Returns the number of steps so far."""
        return len(running.read_events(self.paths, "step"))

    def rank(self) -> int | None:
        """Returns the id of the process that runs the rank of this pod, None if there is none."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"finetune_trainer.rank" in command and f"={self.paths.scratch}\0".encode() in environment + b"\0":
                return int(folder.name)
        return None


def _start(stage: child.Stage, root: Path) -> Pod:
    shape = kit.TINY if stage.setting.tiny else kit.LLAMA_30M
    model = kit.write_model(root / "model", shape.config())
    scratch = root / "scratch"
    scratch.mkdir()
    draft = root / "draft"
    draft.mkdir()
    recipe = Recipe(training={"max_steps": 1_000_000, "compile": "never"})
    paths = kit.prepare(draft, model, pairs(60), recipe, device=stage.setting.device)
    run = parse(paths.run_config.read_bytes())
    run = run.model_copy(
        update={
            "model": run.model.model_copy(update={"location": _location(f"file://{model}")}),
            "data": run.data.model_copy(update={"train": _location(f"file://{paths.data('train')}")}),
            "output": _location(f"file://{root}/out"),
            "scratch": str(scratch),
            "metrics_port": 0,
            "stall_seconds": _STALL_SECONDS,
        }
    )
    (root / "run.json").write_text(json.dumps(run.to_json()))
    log = root / "supervisor.log"
    environment = {
        **os.environ,
        names.ENV_RUN_CONFIG: str(root / "run.json"),
        names.ENV_TERMINATION_LOG: str(root / "result.json"),
        names.ENV_NODE_RANK: "0",
        "FINETUNE_LOG_FORMAT": "text",
    }
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "finetune_trainer"], env=environment, stdout=out, stderr=out)
    return Pod(process, Paths(scratch), root / "result.json", log)


def _watch(stage: child.Stage, pod: Pod, before: int | None) -> None:
    began = time.monotonic()
    if not _until(lambda: pod.steps() >= 3, 90):
        tail = " ".join(pod.log.read_text(errors="replace").split())[-300:]
        stage.report("supervisor", "wrong", f"no step in 90 s: {tail}")
        return
    stage.report(
        "supervisor", "right", f"three steps {time.monotonic() - began:.1f} s after its start", samples=_samples()
    )
    rank = pod.rank()
    if rank is None:
        stage.report("stacks", "failed", "the rank's process isn't found")
        return
    _stacks(stage, pod, rank)
    _flight_record(stage, pod)
    training = _used()
    _stall(stage, pod, rank)
    _freed(stage, before, training)


def _stacks(stage: child.Stage, pod: Pod, rank: int) -> None:
    os.kill(rank, signal.SIGUSR1)
    log = pod.paths.rank_log(0)
    dumped = _until(lambda: "(most recent call first)" in log.read_text(errors="replace"), 5)
    before = pod.steps()
    continues = _until(lambda: pod.steps() > before, 10)
    text = f"SIGUSR1 wrote {'' if dumped else 'no '}stacks, and training {'continued' if continues else 'stopped'}"
    stage.report("stacks", "right" if dumped and continues else "wrong", text)


def _flight_record(stage: child.Stage, pod: Pod) -> None:
    """Tests whether a rank that trains writes its last collectives on request."""
    file = pod.paths.flight_record(0)
    pod.paths.flight_request.touch()
    written = _until(file.exists, 10)
    calls = flight_records.calls(file.read_text()) if written else ()
    backend = "nccl" if stage.setting.device == "cuda" else "gloo"
    own = [call for call in calls if call.group.startswith(backend)]
    text = f"{len(own)} of {len(calls)} collectives are {backend}'s; the last: {flight_records.last_calls(calls)}"
    stage.report("flight recorder", "right" if own else "wrong", text)


def _stall(stage: child.Stage, pod: Pod, rank: int) -> None:
    began = time.monotonic()
    os.kill(rank, signal.SIGSTOP)
    ended = _until(lambda: pod.process.poll() is not None, _STALL_SECONDS + 40)
    duration = time.monotonic() - began
    reason = json.loads(pod.result.read_text()).get("reason", "") if pod.result.is_file() else ""
    text = f"a stalled rank was stopped after {duration:.1f} s (limit {_STALL_SECONDS}), reason {reason or 'none'}"
    stage.report("stall", "right" if ended and reason == "Stalled" else "wrong", text, seconds=duration, reason=reason)


def _freed(stage: child.Stage, before: int | None, training: int | None) -> None:
    if before is None or training is None:
        stage.report("memory after a kill", "skipped", "NVML reports no GPU")
        return
    began = time.monotonic()
    freed = _until(lambda: (_used() or 0) < before + _FREE_BYTES, 15)
    text = f"{training / 2**30:.2f} GiB in use while training, {(_used() or 0) / 2**30:.2f} after"
    verdict = "right" if freed and training > before + _FREE_BYTES else "wrong"
    stage.report(
        "memory after a kill", verdict, f"{text} {time.monotonic() - began:.1f} s, {before / 2**30:.2f} before"
    )


def _used() -> int | None:
    samples = Gpus().sample()
    return samples[0].memory_used_bytes if samples else None


def _samples() -> list[dict[str, object]]:
    return [sample.model_dump() for sample in Gpus().sample()]


def _until(condition: Callable[[], bool], timeout: float) -> bool:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def _location(uri: str) -> Location:
    return Location(uri=uri, display=uri)


if __name__ == "__main__":
    child.main("operations", run)
