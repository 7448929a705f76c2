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

from finetune_api.spec.hardware import StrategyOption
from finetune_trainer.kernels.cuda import toolchain


@dataclass(frozen=True)
class _Gain:
    """Holds the share of the time that compiling saves, the seconds that it takes, and the speed of
    matrix products in GFLOP/s if it isn't measured."""

    share: float
    seconds: float
    gflops: float = 0.0


_GAINS = {
    # Measured on a CPU with fast bfloat16 that was busy with other work (docs/decisions/0021). In
    # float32, matrix products take nearly all of the time, so compiling gains nothing.
    "cpu": _Gain(0.08, 15.0),
    # Estimated (docs/decisions/0036): half of what torchtitan's table shows for layers without
    # fused kernels, at the rate that speed_estimate assumes.
    "cuda": _Gain(0.08, 90.0, 300e3),
}
_MIN_RETURN = 3.0  # times the cost
CHECKED_AT_STEP = 20
"""The step after which the number of compiled programs is reported."""


@dataclass(frozen=True)
class Conditions:
    """Holds the facts that the decision depends on.

    `half`: matrix products are in bfloat16. `strategy` is the parallel strategy. `recompute`:
    activation checkpointing is on. `packed`: rows have no padding. `shared`: ranks share rows.
    """

    device: str
    half: bool
    strategy: StrategyOption
    recompute: bool
    packed: bool
    shared: bool = False


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
    if not conditions.half:
        return False, "no gain was measured in float32; training.compile: always tries it"
    return None


def pays(seconds: float, device: str) -> tuple[bool, str]:
    """Returns (whether compiling saves enough time, the reason) if training takes about
    `seconds`."""
    gain = _GAINS[device]
    saved = seconds * gain.share
    figures = f"training takes about {seconds:.0f} s, compiling {gain.seconds:.0f} s to save about {saved:.0f} s"
    return saved > _MIN_RETURN * gain.seconds, figures


def assumed_gflops(device: str) -> float:
    """Returns the speed of matrix products in GFLOP/s that is assumed of a device, or 0 if it is to
    be measured."""
    return _GAINS[device].gflops


def _obstacle(conditions: Conditions) -> str:
    if conditions.strategy not in ("ddp", "fsdp"):
        return f"layers that DeepSpeed runs ({conditions.strategy}) aren't compiled"
    if conditions.device == "cpu":
        if conditions.strategy == "fsdp":
            return "layers that are sharded over the ranks are compiled on GPUs only"
        if conditions.recompute:
            return "layers whose activations are recomputed are compiled on GPUs only"
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return "there is no C++ compiler"
    if conditions.shared:
        return "layers that exchange parts of rows with other processes aren't compiled"
    if not conditions.packed:
        return "only rows without padding are compiled"
    if conditions.device == "cuda":
        return toolchain.missing()
    return ""


def training_seconds(tokens: float, parameters: int, *, lora: bool, gflops: float) -> float:
    """Returns the estimated duration of training on `tokens` tokens with one rank, in seconds.

    The estimate assumes 4 (LoRA) or 6 operations per token and parameter, at half of the measured
    speed.
    """
    return tokens * (4 if lora else 6) * parameters / (0.5e9 * gflops)


def compile_layers(layers: list[Any], cache: Path, backend: str = "inductor") -> None:
    """Compiles the layers at their first step. The programs are stored in `cache`, on the node's
    scratch disk."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch._dynamo.utils.counters.clear()
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def stop_compiling(layers: list[Any]) -> None:
    """Runs the layers uncompiled from now on."""
    for layer in layers:
        layer._compiled_call_impl = None
    torch._dynamo.reset()


@dataclass(frozen=True)
class Programs:
    """Counts compiled programs, and the attempts to compile one that ended uncompiled because there
    were too many or because an operation can't be compiled."""

    compiled: int
    uncompiled: int

    @classmethod
    def of_this_process(cls) -> Programs:
        """Returns what was compiled since `compile_layers`."""
        counters = torch._dynamo.utils.counters
        frames = counters["frames"]
        failed = frames["total"] - frames["ok"] + sum(counters["graph_break"].values())
        return cls(counters["stats"]["unique_graphs"], failed)

    def decision(self) -> tuple[str, str]:
        """Returns (what happened, in words, the reason)."""
        if self.uncompiled:
            return (
                f"{self.compiled} programs, and some layers run uncompiled",
                f"{self.uncompiled} attempts to compile one failed; PyTorch's log names the reason",
            )
        return f"{self.compiled} programs", f"compiled by step {CHECKED_AT_STEP} for all layouts of rows until then"
