"""Measures what the table of speeds doesn't show.

That is the speed of two ranks, the start, the share of everything except training, and loss curves.
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
    """Compares the speed of two ranks with half of the threads each with one rank with all."""
    threads = bench.options.threads
    speeds = {}
    for ranks in (1, 2):
        record = ours.run(bench.request("mixed", ranks=ranks, threads=max(1, threads // ranks)))
        speed = ours.speed(record)
        speeds[ranks] = {
            "tokens_per_second": speed.tokens / speed.seconds,
            "steps": speed.steps,
            "seconds": speed.seconds,
            "peak_rss_bytes": record.ended.rss,
            "share_of_step_by_part": dict(speed.parts),
        }
    ratio = speeds[2]["tokens_per_second"] / speeds[1]["tokens_per_second"]
    return {"ratio": ratio, "one_rank": speeds[1], "two_ranks": speeds[2], "threads": threads}


def start(bench: Bench, rounds: int = 2) -> dict[str, Any]:
    """Measures the seconds until the first step on a warm token cache, and those of a model load.

    Both are complete processes, with Python, the imports of torch and Transformers, and the
    weights. The fastest of some rounds counts.
    """
    starts: list[tuple[float, dict[str, float]]] = []
    loads: list[float] = []
    for _ in range(rounds):
        record = ours.run(bench.request("short"), again=True)
        step = record.all("step")[0]
        begins = {event["phase"]: event["time"] - record.began for event in record.all("phase")}
        starts.append((step["time"] - step["seconds"]["total"] - record.began, begins))
        dtype = record.choices.get("dtype", "float32")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", _LOAD, str(bench.model), dtype]
            environment = processes.environment(bench.options.threads)
            ended = processes.run([(command, environment)], log=Path(folder) / "log", timeout=300)
            if any(ended.codes):
                raise RuntimeError(processes.tail(Path(folder) / "log"))
        loads.append(ended.seconds)
    seconds, begins = min(starts, key=lambda measured: measured[0])
    return {
        "seconds": seconds,
        "model_load_seconds": min(loads),
        "seconds_over_model_load": seconds - min(loads),
        "phase_begins_at": begins,
    }


def overhead(bench: Bench) -> dict[str, Any]:
    """Measures the share of a run's time spent on evaluation, checkpoints, and result and upload.

    The supervisor runs as in a pod, with a twentieth of the rows held out and checkpoints every
    tenth of the run. The output is a folder, so an upload is a copy. Fetching and loading are
    reported, but not counted.
    """
    epochs = 0.1 if bench.options.quick else 3.0
    request = bench.request("short", validation=0.05, training={"epochs": epochs}, seconds=0.0, timeout=900.0)
    record = ours.supervised(request)
    end = record.began + record.ended.seconds
    steps = record.all("step")
    moments = sorted((event["time"], event["type"], event) for event in record.events)
    evaluation = since = 0.0
    for moment, kind, event in moments:
        if kind == "phase" and event["phase"] == "evaluating":
            since = moment
        elif since and kind == "phase":
            evaluation, since = evaluation + moment - since, 0.0
    saved = [event["stall_seconds"] for event in record.all("checkpoint")]
    done = max(event["time"] for event in record.all("phase"))
    parts = {"evaluation": evaluation, "checkpoints": sum(saved), "result and upload": end - done}
    return {
        "share": sum(parts.values()) / (end - record.began),
        "seconds_by_part": parts,
        "run_seconds": end - record.began,
        "before_the_first_step": steps[0]["time"] - steps[0]["seconds"]["total"] - record.began,
        "steps": len(steps),
        "checkpoints": len(saved),
    }


def curves(bench: Bench) -> dict[str, Any]:
    """Compares our losses with TRL's by step, on the same rows in the same order without dropout.

    The drawing is written next to the result file.
    """
    training = {"max_steps": CURVE_STEPS, "learning_rate": CURVE_RATE}
    request = bench.request(
        "short", global_batch=CURVE_BATCH, training=training, dropout=0.0, seconds=0.0, timeout=900.0
    )
    record = ours.run(request)
    losses: dict[str, Sequence[float]] = {"finetune": [step["loss"] for step in record.all("step")]}
    task = bench.task("short", CURVE_BATCH)
    dtype = search.FLOAT32 if record.choices.get("dtype") == "float32" else search.BFLOAT16[2]
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
