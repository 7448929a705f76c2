"""Measures speed, MFU, and memory against its estimate, with random weights of an 8B model.

Smaller cards use smaller models.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.gpu import child, flops, kit, running, timing
from benchmarks.gpu.kit import Recipe

_QV = {"rank": 16, "alpha": 32, "target_modules": ("q_proj", "v_proj")}
_ALL = {"rank": 16, "alpha": 32, "target_modules": ("all-linear",), "dropout": 0.05}


@dataclass(frozen=True)
class Cell:
    """One run, whose steps have `rows` rows of about `tokens` tokens."""

    name: str
    recipe: Recipe
    tokens: int
    rows: int
    shape: kit.Shape


def run(stage: child.Stage) -> None:
    device, tiny = stage.setting.device, stage.setting.tiny
    shape, full = _shapes(device, tiny)
    ceiling = _ceiling(device)
    with TemporaryDirectory(dir=running.scratch_root(device)) as name:
        root = Path(name)
        with stage.guarded("weights"):
            models = {size.name: kit.write_large_model(root / f"model-{i}", size, device)
                      for i, size in enumerate({shape, full} if full else {shape})}  # fmt: skip
            if device == "cuda":
                torch.cuda.empty_cache()
        for cell in _cells(shape, full, tiny)[: 1 if stage.setting.short else None]:
            with stage.guarded(cell.name):
                _measure(stage, cell, models[cell.shape.name], root, ceiling)
        for liger in (False, True):
            with stage.guarded(f"peer{', Liger' if liger else ''}"):
                _peer(stage, shape, models[shape.name], ceiling, liger=liger)


def _shapes(device: str, tiny: bool) -> tuple[kit.Shape, kit.Shape | None]:
    """Returns the models for LoRA and for full training that fit the card's memory.

    Full training needs 16 bytes per weight; None if no model fits.
    """
    if tiny or device != "cuda":
        return kit.TINY, None
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    lora = kit.LLAMA_8B if memory > 40 else kit.LLAMA_3B if memory > 20 else kit.LLAMA_1B
    full = kit.LLAMA_3B if memory > 100 else kit.LLAMA_1B if memory > 40 else None
    return lora, full


def _cells(shape: kit.Shape, full: kit.Shape | None, tiny: bool) -> list[Cell]:
    usual, long, longer = (48, 96, 192) if tiny else (776, 16384, 32768)
    recompute = {"activation_checkpointing": "always"}
    cells = [
        Cell("LoRA q,v", Recipe(lora=_QV, longest=2 * usual), usual, 16, shape),
        Cell("LoRA all-linear", Recipe(lora=_ALL, longest=2 * usual), usual, 16, shape),
        Cell("all-linear, recomputed, 16k", Recipe(lora=_ALL, longest=long, training=recompute), long, 1, shape),
        Cell("q,v, recomputed, one row of 32k", Recipe(lora=_QV, longest=longer, training=recompute), longer, 1, shape),
        Cell("nf4, q,v", Recipe(lora=_QV, quantization="nf4", longest=2 * usual), usual, 16, shape),
    ]
    if full is not None:
        cells.insert(2, Cell("full", Recipe(lora=None, longest=2 * usual), usual, 16, full))
    return cells


def _measure(stage: child.Stage, cell: Cell, model: Path, root: Path, ceiling: float) -> None:
    device = stage.setting.device
    with TemporaryDirectory(dir=root) as name:
        training = {"global_batch_size": cell.rows, "max_steps": 400, **cell.recipe.training}
        recipe = Recipe(**{**vars(cell.recipe), "training": training})
        paths = kit.prepare(
            Path(name), model, kit.documents(8 * cell.rows, cell.tokens), recipe, device=device, threads=8
        )
        options = ("--rank", "16", "--kernels")
        ran = running.run_for(paths, 1.0 if stage.setting.tiny else 6.0, timeout=100, options=options)
        _report(stage, cell, ran, ceiling)


def _report(stage: child.Stage, cell: Cell, ran: running.FinishedRank, ceiling: float) -> None:
    steps, device = ran.events("step"), stage.setting.device
    if not steps:
        stage.report(cell.name, "wrong", ran.error, seconds=ran.seconds)
        return
    row_tokens = steps[-1]["tokens"] / cell.rows
    work = flops.needed(
        cell.shape, tokens=1, labels=steps[-1]["label_tokens"] / steps[-1]["tokens"], pairs=(row_tokens + 1) / 2,
        full=cell.recipe.lora is None,
    )  # fmt: skip
    rate = running.tokens_per_second(ran, skip=6)
    nominal = flops.peak(torch.cuda.get_device_name()) if device == "cuda" else None
    mfu = rate * work / nominal if nominal else None
    peak, estimate = ran.observed.get("peak_allocated_bytes"), ran.estimate_bytes
    ratio = estimate / peak if peak and estimate else None
    kernels: list[dict[str, Any]] = ran.observed.get("kernels", [])
    first = ", ".join(f"{kernel['name'][:28]} {kernel['share']:.0%}" for kernel in kernels[:2])
    syncs = ran.observed.get("host_syncs")
    stage.report(
        cell.name, "figure",
        f"{rate:.0f} tokens/s"
        + (f", MFU {mfu:.1%}" if mfu else "")
        + f", {rate * work / ceiling:.1%} of the ceiling of products; "
        + (f"peak {peak / 2**30:.1f} GiB, estimate {ratio:.2f} times that; " if peak and ratio else "")
        + (f"{sum(syncs.values())} host syncs; " if syncs is not None else "")
        + first,
        seconds=ran.seconds, shape=cell.shape.name, tokens_per_second=rate, mfu=mfu, of_ceiling=rate * work / ceiling,
        tokens_a_row=row_tokens, peak_allocated_bytes=peak, peak_reserved_bytes=ran.observed.get("peak_reserved_bytes"),
        estimate_bytes=estimate, host_syncs=syncs, kernels=kernels, products=ran.observed.get("products"),
        step_seconds=steps[-1]["seconds"],
        decisions={t: ran.decision(t) for t in ("strategy", "memory", "microBatchSize", "activationCheckpointing")},
    )  # fmt: skip


def _ceiling(device: str) -> float:
    """Returns the FLOP/s of a large bfloat16 matrix product in this process."""
    n = 8192 if device == "cuda" else 256
    left, right = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / timing.seconds(lambda: left @ right, device)


def _peer(stage: child.Stage, shape: kit.Shape, model: Path, ceiling: float, *, liger: bool) -> None:
    name = "Transformers with Liger, q,v" if liger else "Transformers' own, q,v"
    if liger and stage.setting.device != "cuda":
        stage.report(name, "skipped", "its kernels are Triton's and need a GPU")
        return
    rows, tokens = (4, 48) if stage.setting.tiny else (8, 776)
    command = [sys.executable, "-m", "benchmarks.gpu.peer", str(model), "--device", stage.setting.device]
    command += ["--rows", str(rows), "--tokens", str(tokens), *(["--liger"] if liger else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode:
        stage.report(name, "failed", " ".join(done.stderr.split())[-300:])
        return
    figures = json.loads(done.stdout.splitlines()[-1])
    work = flops.needed(shape, tokens=1, labels=1, pairs=(tokens + 1) / 2, full=False)
    share = figures["tokens_per_second"] * work / ceiling
    text = (
        f"{figures['tokens_per_second']:.0f} tokens/s, {share:.1%} of the ceiling of products; all tokens are predicted"
    )
    stage.report(name, "figure", text, **figures, of_ceiling=share)


if __name__ == "__main__":
    child.main("large", run)
