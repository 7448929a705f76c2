"""Writes references.json: the losses of every reference run in float32 on a CPU.

It runs as `make gpu-references` and takes a few minutes. Weights and rows are the same bytes on
every machine, so that runs on GPUs can be compared with these losses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu import cells, kit, running
from benchmarks.gpu.stages import ranks


def losses(*, tiny: bool) -> dict[str, list[float]]:
    """Returns the losses of the ten steps of each reference run, by its name."""
    by_reference: dict[str, list[float]] = {}
    with TemporaryDirectory() as name:
        root = Path(name)
        models = ranks.write_models(root / "models", {cell.model for cell in cells.CELLS}, tiny=tiny)
        for reference, cell in cells.references().items():
            scratch = root / "".join(letter if letter.isalnum() else "-" for letter in reference)
            scratch.mkdir()
            paths = kit.prepare(scratch, models[cell.model], ranks.rows_of(cell), cell.recipe, device="cpu")
            ran = running.run(paths, timeout=900)
            if ran.code:
                raise SystemExit(f"{reference}: {ran.error}")
            rounded = [round(loss, 6) for loss in ran.losses]
            by_reference[reference] = rounded
            print(f"{'tiny' if tiny else 'card'} {reference}: {rounded[0]} → {rounded[-1]}", flush=True)
    return by_reference


if __name__ == "__main__":
    document = {"tiny": losses(tiny=True), "card": losses(tiny=False)}
    ranks.REFERENCES.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(0)
