"""The runs of stage `ranks`: every strategy with LoRA and full training, and every method once.

Each is judged by the losses of the same run in float32 on a CPU (`references.json`, written by
`make gpu-references`), and by the dtype in which its matrix products were computed. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from benchmarks.gpu.kit import Recipe
from benchmarks.gpu.results import Verdict

# How much a step's loss may differ from the reference's, as a share of the decrease of the
# reference's loss: a run that learns nothing, or twice as fast, must not pass as rounding.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}
COARSE = 0.2  # for a quantized base, or an optimizer with 8-bit state
_LORA_RATE, _FULL_RATE = 2e-2, 1e-3  # the loss falls by several tenths in ten steps

Rows = Literal["pairs", "preferences"]


@dataclass(frozen=True)
class Cell:
    """One run. `reference` names the run whose losses it should have.

    Several cells can share a reference, since not every option changes the mathematics.
    """

    name: str
    reference: str
    recipe: Recipe
    model: str = "llama"
    rows: Rows = "pairs"
    tolerance: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    `dtype` is the one that the trainer decided on; `products` are shares (0 to 1) of the base
    model's FLOPs by the dtype in which they were computed.
    """

    losses: Sequence[float]
    dtype: str
    products: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def _strategies() -> list[Cell]:
    strategies = [
        ("ddp", "none"), ("zero1", "none"), ("zero2", "none"), ("zero3", "none"), ("fsdp", "none"),
        ("fsdp", "parameters"), ("zero2", "optimizer"), ("zero3", "parameters"),
    ]  # fmt: skip
    cells = []
    for strategy, offload in strategies:
        suffix = "" if offload == "none" else f", {offload} offloaded"
        recipe = Recipe(strategy=strategy, offload=offload)
        cells.append(Cell(f"LoRA, {strategy}{suffix}", "LoRA", recipe))
        cells.append(Cell(f"full, {strategy}{suffix}", "full", replace(recipe, lora=None)))
    return cells


def _methods() -> list[Cell]:
    plain = Recipe()

    def optimizer(name: str) -> Recipe:
        return Recipe(training={"optimizer": name})

    return [
        Cell("nf4", "nf4", Recipe(quantization="nf4"), tolerance=COARSE),
        Cell("int8", "int8", Recipe(quantization="int8"), tolerance=COARSE),
        Cell("adamw_8bit", "LoRA", optimizer("adamw_8bit"), tolerance=COARSE),
        Cell("paged_adamw_8bit", "LoRA", optimizer("paged_adamw_8bit"), tolerance=COARSE),
        Cell("muon", "muon", replace(optimizer("muon"), lora=None)),
        Cell("DoRA", "DoRA", Recipe(lora={"dora": True})),
        Cell(
            "all-linear",
            "all-linear",
            Recipe(lora={"target_modules": ("all-linear",)}, training={"learning_rate": 5e-3}),
        ),
        Cell("DPO", "DPO", Recipe(training={"objective": "dpo", "learning_rate": 5e-3}), rows="preferences"),
        Cell("packing off", "LoRA", replace(plain, packing=False)),
        Cell("recompute", "LoRA", Recipe(training={"activation_checkpointing": "always"})),
        Cell("compile", "LoRA", Recipe(training={"compile": "always"})),
        Cell("Gemma 2", "gemma2", plain, model="gemma2"),
        Cell("Gemma 3", "gemma3", plain, model="gemma3"),
        Cell("gpt-oss", "gpt-oss", plain, model="gpt-oss"),
    ]


def _with_rate(cell: Cell) -> Cell:
    rate = _FULL_RATE if cell.recipe.lora is None else _LORA_RATE
    training = {"learning_rate": rate, **cell.recipe.training}
    return replace(cell, recipe=replace(cell.recipe, training=training))


CELLS = tuple(map(_with_rate, _strategies() + _methods()))


def references() -> dict[str, Cell]:
    """Returns the reference runs by name.

    Each is the first cell that refers to it, but in float32 and with nothing sharded or offloaded.
    """
    reference_cells: dict[str, Cell] = {}
    for cell in CELLS:
        plain = replace(cell.recipe, strategy="ddp", offload="none", dtype="float32")
        reference_cells.setdefault(cell.reference, replace(cell, name=cell.reference, recipe=plain))
    return reference_cells


def judge(cell: Cell, outcome: Outcome, reference: Sequence[float]) -> tuple[Verdict, str]:
    """Returns right or wrong, and the reason. `reference` are the losses of the reference run."""
    if outcome.error:
        return "wrong", outcome.error
    if len(outcome.losses) != len(reference):
        return "wrong", f"{len(outcome.losses)} of {len(reference)} steps"
    decrease = reference[0] - min(reference)
    difference = max(abs(a - b) for a, b in zip(outcome.losses, reference, strict=True)) / decrease
    allowed = cell.tolerance or TOLERANCE.get(outcome.dtype, TOLERANCE["bfloat16"])
    computed = ", ".join(f"{share:.0%} {kind}" for kind, share in outcome.products.items())
    text = (
        f"loss differs by {difference:.1e} of its decrease; decided {outcome.dtype}, "
        f"products {computed or 'not observed'}"
    )
    other = [kind for kind, share in outcome.products.items() if kind != outcome.dtype and share > 0.01]
    if not difference <= allowed:
        return "wrong", f"{text}; at most {allowed:.0e} is rounding"
    return ("wrong", f"{text}: not the decided format") if other else ("right", text)
