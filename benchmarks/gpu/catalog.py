"""The stages in their order, each with its time limit and the question that it answers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A module of `benchmarks.gpu.stages`.

    `seconds` is its time limit on a GPU, `rehearsal_seconds` that of a rehearsal,
    which may run next to other tests.
    """

    name: str
    seconds: int
    question: str
    rehearsal_seconds: int = 360


STAGES = (
    Stage(
        "machine",
        30,
        "Which versions and driver are installed, and how fast are copies, matrix products and attention?",
    ),
    Stage("attention", 60, "Is packed attention exact on this GPU for every head size, and which kernel is fastest?"),
    Stage("head", 45, "Are the loss and the gradients of the chunked head exact, and which chunk size is fastest?"),
    Stage("fused", 45, "Are the fused kernels exact and used, how fast are they, and what do they save?"),
    Stage(
        "ranks", 170, "Does every strategy and method train, with the losses of the CPU and in the chosen dtype?", 900
    ),
    Stage("large", 170, "How fast is an 8B model, and how far off is the memory estimate?", 600),
    Stage(
        "memory", 60, "Does a run that lacks memory continue with the same loss, and how much is lost to fragmentation?"
    ),
    Stage("fsdp", 60, "How much memory does one of eight ranks of a sharded 8B model need, and how long is its step?"),
    Stage("resume", 60, "How close to bit-identical is a run that was stopped or killed and resumed?", 600),
    Stage("operations", 60, "Does the supervisor detect a stalled rank, and is the GPU free after a kill?", 600),
)


class UnknownStage(ValueError):
    """No stage has this name; the message lists the existing ones."""


def chosen(names: Sequence[str]) -> tuple[Stage, ...]:
    """Returns the named stages in the order of `names`; all of them if it is empty.

    Raises UnknownStage.
    """
    by_name = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names if name not in by_name]:
        raise UnknownStage(f"--stages: there is no {', '.join(unknown)}; there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in names) or STAGES


def limit(stage: Stage, *, rehearsal: bool, left: float) -> float:
    """Returns a stage's time limit in seconds: its own, or what is left of the budget if less."""
    return min(left, float(stage.rehearsal_seconds if rehearsal else stage.seconds))
