"""Whether the decoder's layers are compiled by PyTorch (inductor), and doing so. Decided by `assembly` before the loop.

All layers of a model share one compiled program, so the price is that of one layer. Evaluation and answers run
uncompiled: they would need programs of their own.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

# Measured on a CPU with fast bfloat16, beside other work (docs/decisions/0021). In float32 products take nearly all the
# time: no gain.
_GAIN = 0.08
_SECONDS = 15.0
_WORTH = 3.0  # so many times its price must be won back


@dataclass(frozen=True)
class Run:
    """What the decision looks at."""

    device: str
    half: bool
    alone: bool  # ranks meet only between steps (ddp)
    recompute: bool
    packed: bool


def settled(asked: Literal["auto", "always", "never"], run: Run, before: bool | None) -> tuple[bool, str] | None:
    """(whether, reason); None where it depends on how long training is going to take, see `pays`.

    A resumed run does as its checkpoint did, so that numbers are rounded alike.
    """
    if asked == "never":
        return False, "training.compile says so"
    lacking = _lacking(run)
    if lacking:
        return False, lacking
    if before is not None:
        return before, "the checkpoint was computed so"
    if asked == "always":
        return True, "training.compile says so"
    if run.device != "cpu" or not run.half:
        return False, "no gain was measured on such hardware; training.compile: always tries it"
    return None


def pays(seconds: float) -> tuple[bool, str]:
    """(whether, reason) for a training of so many seconds, roughly."""
    won = seconds * _GAIN
    figures = f"training takes about {seconds:.0f} s, compiling {_SECONDS:.0f} s to save about {won:.0f} s"
    return won > _WORTH * _SECONDS, figures


def _lacking(run: Run) -> str:
    if not run.alone:
        return "layers that are split over the ranks aren't compiled"
    if run.recompute:
        return "layers whose activations are recomputed aren't compiled"
    if not run.packed:
        return "only rows without padding are compiled"
    if run.device == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "there is no C++ compiler"
    return ""


def seconds(tokens: float, parameters: int, *, lora: bool, gflops: float) -> float:
    """Of training on so many computed tokens by one rank: 4 or 6 operations a parameter at half the measured speed."""
    return tokens * (4 if lora else 6) * parameters / (0.5e9 * gflops)


def compile_layers(layers: list[Any], cache: Path) -> None:
    """Takes effect at the first step. Programs are kept on the node's scratch disk."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch._dynamo.config.suppress_errors = True  # what can't be compiled runs as it is
    for layer in layers:
        layer.compile(dynamic=True)
