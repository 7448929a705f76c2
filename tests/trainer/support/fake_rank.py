"""A program that replaces the ranks in tests of the supervisor: it writes the same files and
events, without a model.

The supervisor starts `python fake_rank.py`. FINETUNE_STAND_IN (JSON, see `FakeRankBehavior`) sets
what goes wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.messages import events as e
from finetune_api.messages.evaluation import Evaluation, Score
from finetune_api.messages.run import JobRef, parse
from finetune_api.reasons import REASONS
from finetune_trainer.manifest import write_checkpoint_manifest
from finetune_trainer.paths import Paths


@dataclass(frozen=True)
class FakeRankBehavior:
    """What a fake rank does. The defaults are a run that succeeds."""

    steps: int = 4
    seconds: float = 0.02  # a step
    checkpoint_every: int = 2
    at_step: int = 0  # `then` happens before this step …
    on_rank: int = 0  # … on this rank
    then: str = ""  # kill | exit | error | memory | hang | abort | orphan | pickle
    attempt: int = 0  # only in this attempt; 0 means in every attempt
    loading: float = 0.0  # seconds before the first step
    hold: str = ""  # a file: training continues after step `hold_at` once it exists
    hold_at: int = 0
    holds: dict[str, str] = field(default_factory=dict)  # more of these: step → file
    smallest: bool = False  # micro-batches can't get smaller
    shards: bool = False  # checkpoints are written in shards, one folder for each node


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # like the real ranks, which agree on a stop through the flag
    behavior = FakeRankBehavior(**json.loads(os.environ.get("FINETUNE_STAND_IN", "{}")))
    paths, rank = Paths(Path(os.environ["FINETUNE_SCRATCH"])), int(os.environ["RANK"])
    run = parse(paths.run_config.read_bytes())
    paths.events.mkdir(parents=True, exist_ok=True)
    event_file = paths.rank_events(rank).open("a", buffering=1)
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} is here", flush=True)

    def report(event: e.Event) -> None:
        if rank == 0 or isinstance(event, e.ErrorEvent | e.CheckpointEvent):
            event_file.write(e.encode(event) + "\n")

    def now() -> float:
        return time.time()

    start = 0
    if (paths.resume / "state.json").exists():
        start = json.loads((paths.resume / "state.json").read_text())["step"]
    report(e.PhaseEvent(time=now(), phase="loading"))
    time.sleep(behavior.loading)
    report(
        e.PlanEvent(
            time=now(), total_steps=behavior.steps, start_step=start, epochs=1, rows=8, tokens_per_epoch=80,
            label_tokens_per_epoch=40, padding_share=0.1, parameters=1000, trainable_parameters=10,
            smallest_micro_batches=behavior.smallest,
        )
    )  # fmt: skip
    if start == 0:
        report(e.EvalEvent(time=now(), step=0, split="test", loss=4.0, label_tokens=40))
    report(e.PhaseEvent(time=now(), phase="training"))
    for step in range(start + 1, behavior.steps + 1):
        if step == behavior.at_step and rank == behavior.on_rank and behavior.attempt in (0, run.job.attempt):
            _misbehave(behavior.then, rank, report)
        time.sleep(behavior.seconds)
        report(
            e.StepEvent(
                time=now(), step=step, epoch=step / behavior.steps, loss=3.0 / step, learning_rate=1e-3,
                grad_norm=0.5, tokens=100, label_tokens=50, samples=8,
                seconds={"data": 0.001, "forward": 0.01, "total": behavior.seconds},
            )
        )  # fmt: skip
        stopping = paths.stop.exists()
        writes = rank == 0 or (behavior.shards and os.environ["LOCAL_RANK"] == "0")
        if writes and (step % behavior.checkpoint_every == 0 or stopping):
            ranks = range(rank, rank + run.world.processes_per_node) if behavior.shards else None
            report(_checkpoint(paths, run.job, step, ranks))
        if stopping:
            report(e.PreemptedEvent(time=now(), step=step))
            return 0
        hold = {**behavior.holds, str(behavior.hold_at): behavior.hold}.get(str(step))
        while hold is not None and not Path(hold).exists() and not paths.stop.exists():
            time.sleep(0.02)
    report(e.EvalEvent(time=now(), step=behavior.steps, split="validation", loss=0.9, label_tokens=40))
    report(e.EvalEvent(time=now(), step=behavior.steps, split="test", loss=1.5, label_tokens=40))
    report(e.SampleEvent(time=now(), index=0, prompt="p", reference="r", before="b", after="a"))
    score = Score(name="rougeL", base=0.1, tuned=0.3, low=0.12345678, high=0.25, rows=1)
    report(e.ScoresEvent(time=now(), evaluation=Evaluation(step=behavior.steps, scores=(score,), answered=1)))
    if rank == 0:
        paths.export.mkdir(parents=True)
        (paths.export / "adapter_model.safetensors").write_bytes(b"weights after %d" % behavior.steps)
        (paths.export / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        report(e.SavedEvent(time=now(), path=str(paths.export), step=behavior.steps))
    report(e.PhaseEvent(time=now(), phase="done"))
    return 0


def _checkpoint(paths: Paths, job: JobRef, step: int, shards: range | None) -> e.CheckpointEvent:
    partial = paths.checkpoints / f"step-{step}.tmp"
    partial.mkdir(parents=True)
    (partial / "state.json").write_text(json.dumps({"step": step}))
    if shards is not None:
        (partial / "index.json").write_text("{}")
    for name in ["weights"] if shards is None else [f"weights-{rank}" for rank in shards]:
        (partial / f"{name}.safetensors").write_bytes(b"w" * 1000 + f"{name} {step}".encode())
    write_checkpoint_manifest(partial, job, step)
    folder = partial.with_suffix("")
    partial.rename(folder)
    return e.CheckpointEvent(
        time=time.time(), step=step, path=str(folder), seconds=0.01, stall_seconds=0.005, bytes=1050
    )


def _misbehave(then: str, rank: int, report: object) -> None:
    if then == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if then == "exit":
        print("RuntimeError: Connection closed by peer", flush=True)
        sys.exit(1)
    if then == "error":
        error = e.ErrorEvent(time=time.time(), rank=rank, reason="NonFiniteLoss", message="loss became NaN at step 3")
        report(error)  # type: ignore[operator]
        sys.exit(REASONS["NonFiniteLoss"].exit_code)
    if then == "memory":
        error = e.ErrorEvent(time=time.time(), rank=rank, reason="OutOfMemory", message="CUDA out of memory")
        report(error)  # type: ignore[operator]
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
