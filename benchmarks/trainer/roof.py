"""Measures the rate of this machine's matrix products for the model's shapes: the roof.

`measure` starts this module as its own process, with as many threads as the systems have. It reads
a request (JSON) from standard input and writes the rates to standard output. Each matrix is
measured forward and backward, as trainers call it (torch.nn.functional.linear), after a warm-up;
the fastest of some rounds counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.trainer.flops import Dimensions, Roof

ROWS = (256, 512, 1024, 2048)
"""The measured numbers of input rows, which are tokens of a micro-batch."""


def measure(
    size: Dimensions, environment: Mapping[str, str], *, device: str, dtypes: tuple[str, ...], seconds: float
) -> dict[str, list[Roof]]:
    """Returns roofs by dtype. `seconds` is the time for measuring one product.

    Raises RuntimeError if the measurement fails.
    """
    request = {"size": asdict(size), "device": device, "dtypes": dtypes, "seconds": seconds, "rows": ROWS}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trainer.roof"],
        input=json.dumps(request), capture_output=True, text=True, env=dict(environment), cwd=root,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the roof can't be measured: {done.stderr[-800:]}")
    return {dtype: [Roof(**roof) for roof in roofs] for dtype, roofs in json.loads(done.stdout).items()}


def main() -> None:
    import torch

    request = json.load(sys.stdin)
    size = Dimensions(**request["size"])
    device = torch.device(request["device"])
    answer: dict[str, list[dict[str, Any]]] = {}
    for dtype in request["dtypes"]:
        answer[dtype] = []
        for rows in request["rows"]:
            forward, backward = {}, {}
            for shape in (*size.matrices, size.head):
                weight = torch.randn(shape.outputs, shape.inputs, device=device).to(getattr(torch, dtype))
                inputs = torch.randn(rows, shape.inputs, device=device).to(weight.dtype)
                gradient = torch.randn(rows, shape.outputs, device=device).to(weight.dtype)
                work = 2 * rows * shape.inputs * shape.outputs
                products: dict[str, Callable[[], Any]] = {
                    "forward": lambda x=inputs, w=weight: torch.nn.functional.linear(x, w),  # type: ignore[misc]
                    "backward": lambda g=gradient, w=weight: torch.mm(g, w),  # type: ignore[misc]
                }
                forward[shape.name] = _rate(products["forward"], work, request["seconds"], device)
                backward[shape.name] = _rate(products["backward"], work, request["seconds"], device)
            answer[dtype].append(asdict(Roof(rows, forward, backward)))
    json.dump(answer, sys.stdout)


def _rate(product: Callable[[], Any], work: int, seconds: float, device: Any) -> float:
    """Returns the FLOP/s of a product, the best of three rounds."""
    import torch

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    product()
    synchronize()
    best = 0.0
    for _ in range(3):
        began, runs = time.perf_counter(), 0
        while True:
            product()
            runs += 1
            if device.type == "cuda" and runs % 16:
                continue
            synchronize()
            if time.perf_counter() - began >= seconds / 3:
                break
        best = max(best, work * runs / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
