"""Decides whether PyTorch (inductor) compiles the decoder's layers, and compiles them.

All layers of a model share one compiled program, so compiling all of them costs as much as
compiling one. Evaluation and generation run uncompiled, since they would need programs of their
own.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

# Measured on a CPU with fast bfloat16 that was busy with other work (docs/decisions/0021). In
# float32, matrix products take nearly all of the time, so compiling gains nothing.
_GAIN = 0.08
_COST_SECONDS = 15.0
_MIN_RETURN = 3.0  # times the cost


@dataclass(frozen=True)
class Conditions:
    """Holds the facts that the decision depends on.

    `half`: matrix products are in bfloat16. `independent_micro_batches`: ranks synchronize only
    between steps (ddp). `recompute`: activation checkpointing is on. `packed`: rows have no
    padding.
    """

    device: str
    half: bool
    independent_micro_batches: bool
    recompute: bool
    packed: bool


def choice(
    option: Literal["auto", "always", "never"], conditions: Conditions, checkpoint: bool | None
) -> tuple[bool, str] | None:
    """Returns (whether to compile, the reason), or None if that depends on the duration of
    training; see `pays`.

    `checkpoint` is whether the checkpoint to resume from was computed with compiled layers, or None
    if there is none. A resumed run does the same, so that numbers are rounded in the same way,
    unless `option` is never or an obstacle rules out compiling.
    """
    if option == "never":
        return False, "set by training.compile"
    obstacle = _obstacle(conditions)
    if obstacle:
        return False, obstacle
    if checkpoint is not None:
        return checkpoint, "the checkpoint was computed this way"
    if option == "always":
        return True, "set by training.compile"
    if conditions.device != "cpu" or not conditions.half:
        return False, "no gain was measured on such hardware; training.compile: always tries it"
    return None


def pays(seconds: float) -> tuple[bool, str]:
    """Returns (whether compiling saves enough time, the reason) if training takes about
    `seconds`."""
    saved = seconds * _GAIN
    figures = f"training takes about {seconds:.0f} s, compiling {_COST_SECONDS:.0f} s to save about {saved:.0f} s"
    return saved > _MIN_RETURN * _COST_SECONDS, figures


def _obstacle(conditions: Conditions) -> str:
    if not conditions.independent_micro_batches:
        return "layers that are sharded over the ranks aren't compiled"
    if conditions.recompute:
        return "layers whose activations are recomputed aren't compiled"
    if not conditions.packed:
        return "only rows without padding are compiled"
    if conditions.device == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "there is no C++ compiler"
    return ""


def training_seconds(tokens: float, parameters: int, *, lora: bool, gflops: float) -> float:
    """Returns the estimated duration of training on `tokens` tokens with one rank, in seconds.

    The estimate assumes 4 (LoRA) or 6 operations per token and parameter, at half of the measured
    speed.
    """
    return tokens * (4 if lora else 6) * parameters / (0.5e9 * gflops)


def compile_layers(layers: list[Any], cache: Path) -> None:
    """Compiles the layers at their first step. The programs are stored in `cache`, on the node's
    scratch disk."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch._dynamo.config.suppress_errors = True  # what can't be compiled runs uncompiled
    for layer in layers:
        layer.compile(dynamic=True)
