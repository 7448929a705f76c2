"""Runs every strategy and method for ten steps, and compares the losses with a CPU's in float32."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu import cells, child, kit, running
from benchmarks.gpu.cells import CELLS, Cell

from testkit.rows import pairs

REFERENCES = Path(__file__).parents[1] / "references.json"
ROWS = 40
SHORT = ("LoRA, ddp", "full, zero1", "LoRA, fsdp")
_RANK = 8  # rank of the adapters
_TOPICS = ("strategy", "head", "packing", "compile")


def run(stage: child.Stage) -> None:
    device, tiny = stage.setting.device, stage.setting.tiny
    references = json.loads(REFERENCES.read_text())["tiny" if tiny else "card"]
    parallel_runs = 4 if device == "cuda" and (os.cpu_count() or 1) >= 8 else 1
    with TemporaryDirectory(dir=running.scratch_root(device)) as name:
        root = Path(name)
        chosen = [cell for cell in CELLS if not stage.setting.short or cell.name in SHORT]
        models = write_models(root / "models", {cell.model for cell in chosen}, tiny=tiny)
        with ThreadPoolExecutor(parallel_runs) as pool:
            list(pool.map(lambda cell: _cell(stage, cell, root, models, references), chosen))


def write_models(root: Path, names: set[str], *, tiny: bool) -> dict[str, Path]:
    """Writes the named models under `root`; returns their folders by name."""
    folders = {}
    for name in sorted(names):
        shape = kit.TINY if tiny else kit.LLAMA_30M
        config = shape.config() if name == "llama" else kit.family(name, tiny=tiny)
        folders[name] = kit.write_model(root / name, config)
    return folders


def rows_of(cell: Cell) -> Sequence[Mapping[str, Any]]:
    """Returns the rows that a cell is trained on."""
    return kit.preferences(ROWS) if cell.rows == "preferences" else pairs(ROWS)


def _cell(
    stage: child.Stage, cell: Cell, root: Path, models: Mapping[str, Path], references: Mapping[str, list[float]]
) -> None:
    with stage.guarded(cell.name):
        scratch = root / "".join(letter if letter.isalnum() else "-" for letter in cell.name)
        scratch.mkdir()
        paths = kit.prepare(scratch, models[cell.model], rows_of(cell), cell.recipe, device=stage.setting.device)
        options = ["--rank", str(_RANK), *(["--cuda-autocast"] if stage.setting.device != "cuda" else [])]
        ran = running.run(paths, options=options, timeout=300)
        report(stage, cell, ran, references[cell.reference])
        shutil.rmtree(scratch, ignore_errors=True)


def report(stage: child.Stage, cell: Cell, ran: running.FinishedRank, reference: Sequence[float]) -> None:
    """Reports a cell's verdict and figures."""
    products = {
        kind.removeprefix("base "): share
        for kind, share in ran.observed.get("products", {}).items()
        if kind.startswith("base ")
    }
    dtype = ran.choice("dtype")
    error = ran.error if ran.code else ""
    verdict, text = cells.judge(cell, cells.Outcome(ran.losses, dtype, products, error), reference)
    peak = ran.observed.get("peak_allocated_bytes")
    stage.report(
        cell.name, verdict, text, seconds=ran.seconds, losses=ran.losses, reference=list(reference), dtype=dtype,
        products=ran.observed.get("products", {}), host_syncs=ran.observed.get("host_syncs"),
        peak_allocated_bytes=peak, peak_reserved_bytes=ran.observed.get("peak_reserved_bytes"),
        estimate_bytes=ran.estimate_bytes, decisions={topic: ran.choice(topic) for topic in _TOPICS},
    )  # fmt: skip


if __name__ == "__main__":
    child.main("ranks", run)
