"""A program that stands in for the ranks, for tests of the supervisor: the same files and events, no model.

Run as `python stand_in.py` by the supervisor; FINETUNE_STAND_IN (JSON, see Behaviour) says what goes wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api import events as e
from finetune_api.evaluation import Evaluation, Score
from finetune_api.reasons import REASONS
from finetune_api.run import parse
from finetune_trainer.manifest_io import write_manifest
from finetune_trainer.paths import Paths


@dataclass(frozen=True)
class Behaviour:
    steps: int = 4
    seconds: float = 0.02  # a step
    checkpoint_every: int = 2
    at_step: int = 0  # `then` happens before this step …
    on_rank: int = 0  # … on this rank
    then: str = ""  # kill | exit | error | memory | hang | abort | orphan | pickle
    attempt: int = 0  # only in this attempt; 0 is every one
    loading: float = 0.0  # seconds before the first step
    hold: str = ""  # a file: training goes on after step `hold_at` once it exists
    hold_at: int = 0
    holds: dict[str, str] = field(default_factory=dict)  # more of these: step → file
    shards: bool = False  # checkpoints are written in shards, a folder a node


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the real ranks: stopping is agreed through the flag
    behaviour = Behaviour(**json.loads(os.environ.get("FINETUNE_STAND_IN", "{}")))
    paths, rank = Paths(Path(os.environ["FINETUNE_SCRATCH"])), int(os.environ["RANK"])
    run = parse(paths.run_config.read_bytes())
    paths.events.mkdir(parents=True, exist_ok=True)
    out = paths.rank_events(rank).open("a", buffering=1)
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} is here", flush=True)

    def say(event: e.Event) -> None:
        if rank == 0 or isinstance(event, e.ErrorEvent | e.CheckpointEvent):
            out.write(e.encode(event) + "\n")

    def now() -> float:
        return time.time()

    start = 0
    if (paths.resume / "state.json").exists():
        start = json.loads((paths.resume / "state.json").read_text())["step"]
    say(e.PhaseEvent(time=now(), phase="loading"))
    time.sleep(behaviour.loading)
    say(
        e.PlanEvent(
            time=now(), total_steps=behaviour.steps, start_step=start, epochs=1, rows=8, tokens_per_epoch=80,
            label_tokens_per_epoch=40, padding_share=0.1, parameters=1000, trainable_parameters=10,
        )
    )  # fmt: skip
    if start == 0:
        say(e.EvalEvent(time=now(), step=0, split="test", loss=4.0, label_tokens=40))
    say(e.PhaseEvent(time=now(), phase="training"))
    for step in range(start + 1, behaviour.steps + 1):
        if step == behaviour.at_step and rank == behaviour.on_rank and behaviour.attempt in (0, run.job.attempt):
            _misbehave(behaviour.then, rank, say)
        time.sleep(behaviour.seconds)
        say(
            e.StepEvent(
                time=now(), step=step, epoch=step / behaviour.steps, loss=3.0 / step, learning_rate=1e-3,
                grad_norm=0.5, tokens=100, label_tokens=50, samples=8,
                seconds={"data": 0.001, "forward": 0.01, "total": behaviour.seconds},
            )
        )  # fmt: skip
        stopping = paths.stop.exists()
        writes = rank == 0 or (behaviour.shards and os.environ["LOCAL_RANK"] == "0")
        if writes and (step % behaviour.checkpoint_every == 0 or stopping):
            ranks = range(rank, rank + run.world.processes_per_node) if behaviour.shards else None
            say(_checkpoint(paths, run.job, step, ranks))
        if stopping:
            say(e.PreemptedEvent(time=now(), step=step))
            return 0
        hold = {**behaviour.holds, str(behaviour.hold_at): behaviour.hold}.get(str(step))
        while hold is not None and not Path(hold).exists() and not paths.stop.exists():
            time.sleep(0.02)
    say(e.EvalEvent(time=now(), step=behaviour.steps, split="validation", loss=0.9, label_tokens=40))
    say(e.EvalEvent(time=now(), step=behaviour.steps, split="test", loss=1.5, label_tokens=40))
    say(e.SampleEvent(time=now(), index=0, prompt="p", reference="r", before="b", after="a"))
    score = Score(name="rougeL", base=0.1, tuned=0.3, low=0.12345678, high=0.25, rows=1)
    say(e.ScoresEvent(time=now(), evaluation=Evaluation(step=behaviour.steps, scores=(score,), answered=1)))
    if rank == 0:
        paths.export.mkdir(parents=True)
        (paths.export / "adapter_model.safetensors").write_bytes(b"weights after %d" % behaviour.steps)
        (paths.export / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        say(e.SavedEvent(time=now(), path=str(paths.export), step=behaviour.steps))
    say(e.PhaseEvent(time=now(), phase="done"))
    return 0


def _checkpoint(paths: Paths, job: object, step: int, shards: range | None) -> e.CheckpointEvent:
    aside = paths.checkpoints / f"step-{step}.tmp"
    aside.mkdir(parents=True)
    (aside / "state.json").write_text(json.dumps({"step": step}))
    if shards is not None:
        (aside / "index.json").write_text("{}")
    for name in ["weights"] if shards is None else [f"weights-{rank}" for rank in shards]:
        (aside / f"{name}.safetensors").write_bytes(b"w" * 1000 + f"{name} {step}".encode())
    write_manifest(aside, kind="checkpoint", job=job, step=step)  # type: ignore[arg-type]
    folder = aside.with_suffix("")
    aside.rename(folder)
    return e.CheckpointEvent(
        time=time.time(), step=step, path=str(folder), seconds=0.01, stall_seconds=0.005, bytes=1050
    )


def _misbehave(then: str, rank: int, say: object) -> None:
    if then == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if then == "exit":
        print("RuntimeError: Connection closed by peer", flush=True)
        sys.exit(1)
    if then == "error":
        said = e.ErrorEvent(time=time.time(), rank=rank, reason="NonFiniteLoss", message="loss became NaN at step 3")
        say(said)  # type: ignore[operator]
        sys.exit(REASONS["NonFiniteLoss"].exit_code)
    if then == "memory":
        said = e.ErrorEvent(time=time.time(), rank=rank, reason="OutOfMemory", message="CUDA out of memory")
        say(said)  # type: ignore[operator]
        sys.exit(REASONS["OutOfMemory"].exit_code)
    if then == "abort":
        os.abort()
    if then == "hang":
        time.sleep(3600)
    if then == "orphan" and os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.1)
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
