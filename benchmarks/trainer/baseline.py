"""Compares the speed of our trainer with that of an earlier revision, alternately and in one run.

It runs as `python benchmarks/trainer/baseline.py REV [--cells "a;b"] [--rounds N]`. The revision is
checked out into a temporary folder, and each run is done by the benchmark of its own revision
(`run_revision`), on the same model and rows, without compiling. benchmarks/results/baseline.json
has all speeds; the cells that aren't measured keep what they had there if both revisions are the
same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / part) for part in ("hack", "operator", "trainer_image"))]

from benchmarks.trainer import data, machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "baseline.json"
_CHILD = Path(__file__).with_name("run_revision.py")


@dataclass(frozen=True)
class Cell:
    """What a run trains: a data set, with adapters or in full, on a number of ranks."""

    dataset: str
    full: bool = False
    ranks: int = 1
    global_batch: int = 16


CELLS = {
    "lora": Cell("mixed"),
    "lora, 2 ranks": Cell("mixed", ranks=2),
    "lora, shared prefix": Cell("shared", global_batch=64),
    "full": Cell("mixed", full=True),
    "full, 2 ranks": Cell("mixed", full=True, ranks=2),
}


def main() -> None:
    options = _options()
    then, now = (_git("rev-parse", "--short", revision) for revision in (options.revision, "HEAD"))
    facts = {"baseline": then, "revision": now, "machine": machine.facts("cpu")}
    for warning in machine.warnings(2):
        print(f"WARNING: {warning}", file=sys.stderr)
    cells = _measured_before(options.out, then, now)
    with checked_out(then) as folder:
        for name in options.cells:
            speeds: dict[str, list[float]] = {"baseline": [], "now": []}
            for number in range(options.rounds):
                order = [("baseline", folder), ("now", ROOT)]
                for kind, root in order if number % 2 == 0 else reversed(order):
                    speeds[kind].append(_tokens_per_second(root, CELLS[name], options.seconds))
            cells[name] = {**asdict(CELLS[name]), **speeds, "ratio": ratio(speeds)}
            print(f"{name}: {cells[name]['ratio']:.3f} of the baseline {speeds}", flush=True)
            options.out.write_text(json.dumps({**facts, "cells": cells}, indent=1) + "\n")


def ratio(speeds: Mapping[str, Sequence[float]]) -> float:
    """Returns the median speed now, relative to the median speed of the baseline."""
    return median(speeds["now"]) / median(speeds["baseline"])


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Provides a working tree of a revision in a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "baseline")
        _git("worktree", "add", "--detach", str(folder), revision)
        try:
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def _tokens_per_second(root: Path, cell: Cell, seconds: float) -> float:
    """Runs a cell with the code in `root`."""
    request = {
        **asdict(cell),
        "model": str(data.model_folder()),
        "rows": str(data.folder() / f"{cell.dataset}.jsonl"),
        "longest": data.LONGEST,
        "seconds": seconds,
    }
    path = ":".join(str(root / part) for part in (".", "hack", "operator", "trainer_image"))
    command = [sys.executable, str(_CHILD), json.dumps(request)]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=root, capture_output=True, text=True, timeout=300
    )
    if ended.returncode:
        raise SystemExit(f"{root}: {ended.stderr[-2000:]}")
    return float(ended.stdout.splitlines()[-1])


def _measured_before(path: Path, then: str, now: str) -> dict[str, Any]:
    document = json.loads(path.read_text()) if path.is_file() else {}
    same = (document.get("baseline"), document.get("revision")) == (then, now)
    return dict(document["cells"]) if same else {}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="the earlier revision")
    parser.add_argument("--cells", default=";".join(CELLS), help="list, separated by semicolons (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each revision (default: %(default)d)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a measurement (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args()
    options.cells = [name.strip() for name in options.cells.split(";")]
    if unknown := set(options.cells) - set(CELLS):
        parser.error(f"--cells: no {', '.join(sorted(unknown))}; there are {'; '.join(CELLS)}")
    return options


if __name__ == "__main__":
    began = time.time()
    main()
    print(f"{time.time() - began:.0f} s")
