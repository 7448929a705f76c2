"""Computes the roofline of every cell and prints a table.

    make roofline                 # about a minute, on any machine
    make roofline CELLS=full      # some cells; the result file isn't written

It writes benchmarks/results/gpu/roofline.json, a list of {cell, mfu, tokens_per_second, limits}.
The figures are those of a model, not measurements: see docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.gpu.roofline.cells import CELLS
from benchmarks.gpu.roofline.model import Roofline, roofline

RESULTS = Path(__file__).parents[2] / "results" / "gpu" / "roofline.json"
_KINDS = ("matmul", "elementwise", "adapters", "attention", "head", "quantization")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cells", default="", help="names of cells, separated by commas")
    names = [name for name in parser.parse_args().cells.split(",") if name]
    unknown = sorted(set(names) - {cell.name for cell in CELLS})
    if unknown:
        parser.error(f"there is no cell {', '.join(unknown)}; there are {', '.join(cell.name for cell in CELLS)}")
    print(header())
    records = []
    for cell in CELLS:
        if not names or cell.name in names:
            result = roofline(cell)
            records.append(result.record())
            print(row(result), flush=True)
    if not names:
        RESULTS.write_text(json.dumps(records, indent=1) + "\n")


def header() -> str:
    """Returns the head of the table in Markdown."""
    columns = ["cell", "tokens", "tokens/s", "MFU", *_KINDS, "kernels per layer", "host waits"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def row(result: Roofline) -> str:
    """Returns a row of the table in Markdown."""
    shares = [f"{result.share(kind):.1%}" for kind in _KINDS]
    figures = [
        f"{result.cell.tokens:,}", f"{result.tokens_per_second:,.0f}", f"{result.mfu:.1%}", *shares,
        str(result.kernels_per_layer), str(result.host_waits),
    ]  # fmt: skip
    return f"| {' | '.join([result.cell.name, *figures])} |"


if __name__ == "__main__":
    main()
