"""What the table of speeds doesn't show: two ranks, the start, the share of everything but training, loss curves.

Called by `__main__` after the systems, each measure once.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.trainer import ours, peers, plot, processes, search

if TYPE_CHECKING:
    from benchmarks.trainer.__main__ import Bench

_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
"""
CURVE_STEPS = 24
CURVE_BATCH = 16
CURVE_RATE = 1e-3


def two_ranks(bench: Bench) -> dict[str, Any]:
    """Tokens a second of two ranks with half of the threads each, over those of one rank with all of them."""
    threads = bench.options.threads
    speeds = {}
    for ranks in (1, 2):
        seen = ours.run(bench.asked("mixed", ranks=ranks, threads=max(1, threads // ranks)))
        speed = ours.speed(seen)
        speeds[ranks] = {
            "tokens_per_second": speed.tokens / speed.seconds,
            "steps": speed.steps,
            "seconds": speed.seconds,
            "peak_rss_bytes": seen.ended.rss,
            "share_of_step_by_part": dict(speed.parts),
        }
    ratio = speeds[2]["tokens_per_second"] / speeds[1]["tokens_per_second"]
    return {"ratio": ratio, "one_rank": speeds[1], "two_ranks": speeds[2], "threads": threads}


def start(bench: Bench, rounds: int = 2) -> dict[str, Any]:
    """From the rank's start to the beginning of its first step on a warm token cache, beside a bare model load.

    Both are whole processes: Python, the imports of torch and Transformers, the weights. Of some rounds the fastest.
    """
    found: list[tuple[float, dict[str, float]]] = []
    loads: list[float] = []
    for _ in range(rounds):
        seen = ours.run(bench.asked("short"), again=True)
        step = seen.all("step")[0]
        begins = {event["phase"]: event["time"] - seen.began for event in seen.all("phase")}
        found.append((step["time"] - step["seconds"]["total"] - seen.began, begins))
        dtype = seen.choices.get("dtype", "float32")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", _LOAD, str(bench.model), dtype]
            environment = processes.environment(bench.options.threads)
            ended = processes.run([(command, environment)], log=Path(folder) / "log", timeout=300)
            if any(ended.codes):
                raise RuntimeError(processes.tail(Path(folder) / "log"))
        loads.append(ended.seconds)
    seconds, begins = min(found, key=lambda each: each[0])
    return {
        "seconds": seconds,
        "model_load_seconds": min(loads),
        "seconds_over_model_load": seconds - min(loads),
        "phase_begins_at": begins,
    }


def overhead(bench: Bench) -> dict[str, Any]:
    """Share of a run's time in which nothing is learnt though learning has begun: evaluation, checkpoints, upload.

    A run of the supervisor, as in a pod, with a twentieth of the rows held out and checkpoints every tenth of the run;
    everything goes into a folder, so an upload is a copy here. Fetching and loading are told, but aren't counted.
    """
    epochs = 0.1 if bench.options.quick else 3.0
    asked = bench.asked("short", validation=0.05, training={"epochs": epochs}, seconds=0.0, timeout=900.0)
    seen = ours.supervised(asked)
    end = seen.began + seen.ended.seconds
    steps = seen.all("step")
    moments = sorted((event["time"], event["type"], event) for event in seen.events)
    evaluating = since = 0.0
    for moment, kind, event in moments:
        if kind == "phase" and event["phase"] == "evaluating":
            since = moment
        elif since and kind == "phase":
            evaluating, since = evaluating + moment - since, 0.0
    saved = [event["stall_seconds"] for event in seen.all("checkpoint")]
    done = max(event["time"] for event in seen.all("phase"))
    parts = {"evaluation": evaluating, "checkpoints": sum(saved), "result and upload": end - done}
    return {
        "share": sum(parts.values()) / (end - seen.began),
        "seconds_by_part": parts,
        "run_seconds": end - seen.began,
        "before_the_first_step": steps[0]["time"] - steps[0]["seconds"]["total"] - seen.began,
        "steps": len(steps),
        "checkpoints": len(saved),
    }


def curves(bench: Bench) -> dict[str, Any]:
    """The loss of every step, ours and TRL's: same rows in the same order, no dropout. Drawn beside the results."""
    training = {"max_steps": CURVE_STEPS, "learning_rate": CURVE_RATE}
    asked = bench.asked("short", global_batch=CURVE_BATCH, training=training, dropout=0.0, seconds=0.0, timeout=900.0)
    seen = ours.run(asked)
    losses: dict[str, Sequence[float]] = {"finetune": [step["loss"] for step in seen.all("step")]}
    task = bench.task("short", CURVE_BATCH)
    dtype = search.FLOAT32 if seen.choices.get("dtype") == "float32" else search.BFLOAT16[2]
    (config,) = search.formats([dtype], search.Times(1e9, 1e9))
    config = {**config, "micro_batch": 4, "max_steps": CURVE_STEPS, "curve": True}
    plain = {**vars(task), "learning_rate": CURVE_RATE, "dropout": 0.0}
    (answer,) = peers.measure("trl", peers.Task(**plain), [config], 900)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    losses["trl"] = answer["losses"]
    both = list(zip(losses["finetune"], losses["trl"], strict=False))
    drawing = bench.options.out.with_name(f"{bench.options.out.stem}-losses.svg")
    drawing.write_text(plot.lines(losses, "Loss by step, the same rows in the same order", "step", "loss"))
    return {
        "losses": losses,
        "dtype": dtype.name,
        "first_step_difference": both[0][0] - both[0][1],
        "largest_difference": max(abs(a - b) for a, b in both),
        "drawn_in": drawing.name,
    }


MEASURES: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
    "two-ranks": two_ranks,
    "start": start,
    "overhead": overhead,
    "curves": curves,
}
