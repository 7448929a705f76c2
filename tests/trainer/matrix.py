"""Family x method x strategy: each cell is run on two ranks, or refused with its reason. `make matrix` writes what came
of it to docs/families.md; test_families runs a slice. What came of a cell is kept outside the checkout, in a file that
is named by the code that ran, so a run that was interrupted goes on.

A cell holds if it gives ddp's losses, and if what it wrote loads by Transformers and PEFT alone, on the base as it was,
with the loss that the run told of the test rows. That loss must have fallen. Of preference pairs the test rows are
those it learns from: what two steps on six pairs do to other pairs says little of whether training works.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api import errors, events
from finetune_api.resource import FullSpec, parse
from testkit import tiny_models
from trainer import many, reload
from trainer.ranks import Ended, Job, Ranks, pairs, prepare

_ROOT = Path(__file__).parents[2]
_PAGE = _ROOT / "docs" / "families.md"
_DECIDING = (
    "uv.lock", "operator/finetune_api/*.py", "trainer_image/finetune_trainer/*.py", "tests/testkit/tiny_models.py",
    "tests/trainer/matrix.py", "tests/trainer/many.py", "tests/trainer/ranks.py", "tests/trainer/reload.py",
)  # fmt: skip
_CLOSE = 2e-4  # of a loss: float32, summed in another order


@dataclass(frozen=True)
class Family:
    """`targets` are the layers that LoRA adapts; `embedding` and `biased` are names that a method needs."""

    title: str
    build: Callable[[Path], Path]
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    embedding: str = "embed_tokens"
    layer: str = "*layers.1.*"


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama, SmolLM2 (tied)", tiny_models.tiny_llama),
    "llama3": Family("Llama 3", tiny_models.tiny_llama3),
    "mistral": Family("Mistral", tiny_models.tiny_mistral),
    "phi3": Family("Phi-3", tiny_models.tiny_phi3, ("qkv_proj",)),
    "qwen2": Family("Qwen 2", tiny_models.tiny_qwen2),
    "qwen3": Family("Qwen 3", tiny_models.tiny_qwen3),
    "gemma": Family("Gemma", tiny_models.tiny_gemma),
    "gemma2": Family("Gemma 2", tiny_models.tiny_gemma2),
    "gemma3": Family("Gemma 3", tiny_models.tiny_gemma3),
    "gpt2": Family("GPT-2", tiny_models.tiny_gpt2, ("c_attn",), "wte", "*h.1.*"),
    "t5": Family("T5", tiny_models.tiny_t5, ("q", "v"), "shared", "*block.1.*"),
    "flan-t5": Family("Flan-T5, T5 1.1", tiny_models.tiny_flan_t5, ("q", "v"), "shared", "*block.1.*"),
}


@dataclass(frozen=True)
class Method:
    """`lora` and `full` as in spec.method, with {targets}, {embedding} and {layer} of the family."""

    lora: dict[str, Any] | None = None
    full: dict[str, Any] | None = None
    quantization: str = "none"
    objective: str = "supervised"
    rate: float = 1e-2  # two steps shall do good, not harm


METHODS: dict[str, Method] = {
    "LoRA": Method({}),
    "all-linear": Method({"targetModules": ["all-linear"]}),
    "rsLoRA": Method({"rankStabilized": True}),
    "DoRA": Method({"dora": True}),
    "LoRA+": Method({"plusRatio": 16}, rate=1e-3),
    "biases": Method({"bias": "all"}),
    "modulesToSave": Method({"modulesToSave": ["{embedding}"]}),
    "addedTokens": Method({"addedTokens": ["<tool>"]}),
    "PiSSA": Method({"init": "pissa"}),
    "OLoRA": Method({"init": "olora"}),
    "nf4": Method({}, quantization="nf4"),
    "int8": Method({}, quantization="int8"),
    "DPO": Method({}, objective="dpo", rate=2e-3),
    "full": Method(full={}, rate=1e-3),
    "freezing": Method(full={"trainable": ["{layer}"]}, rate=1e-3),
    "full DPO": Method(full={}, objective="dpo", rate=1e-3),
}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class Cell:
    family: str
    method: str
    strategy: str


@dataclass
class Outcome:
    """`why` it was refused, or `wrong` in what it did; both empty where the cell holds."""

    why: str = ""
    wrong: str = ""
    losses: tuple[float, ...] = ()
    elsewhere: bool = False  # pairs of an older run: the loss that fell was of others than those it learnt from
    ended: Ended | None = field(default=None, repr=False)

    @property
    def holds(self) -> bool:
        return not self.why and not self.wrong


_UNKNOWN = Outcome(why="Not run yet.")
_ELSEWHERE = "an older run: the loss that fell was that of three pairs that it didn't learn from"


def run(root: Path, cells: Iterable[Cell], known: Mapping[Cell, Outcome] | None = None) -> dict[Cell, Outcome]:
    """Runs them, a group of processes for each family and strategy. `known`: others, to compare with."""
    wanted = list(cells)
    bases = {name: _base(root / "bases" / name, FAMILIES[name]) for name in {cell.family for cell in wanted}}
    found: dict[Cell, Outcome] = {}
    jobs: dict[Cell, Job] = {}
    for at, cell in enumerate(wanted):
        try:
            jobs[cell] = _job(root / str(at), bases[cell.family], cell)
        except ValidationError as error:
            found[cell] = Outcome(why=_refused_by_the_api(error))
    for group in {(cell.family, cell.strategy): 0 for cell in jobs}:
        own = {cell: job for cell, job in jobs.items() if (cell.family, cell.strategy) == group}
        found.update(_together(own))
    for cell in [cell for cell in wanted if cell in found and found[cell].ended]:
        _judge(cell, {**(known or {}), **found}, root / f"tokens-{cell.family}-{cell.method}")
    return {cell: found[cell] for cell in wanted}


def _base(folder: Path, family: Family) -> Path:
    """Without the dropout that some families bring along, so that runs can be compared."""
    path = family.build(folder) / "config.json"
    config = json.loads(path.read_text())
    still = {key: 0.0 for key, value in config.items() if "drop" in key and isinstance(value, float)}
    path.write_text(json.dumps({**config, **still}))
    return folder


def _job(folder: Path, base: Path, cell: Cell) -> Job:
    """Raises ValidationError where the API refuses what the cell asks for."""
    method, spec = METHODS[cell.method], _spec(cell)
    job = prepare(
        folder,
        base,
        _rows(method, 6, 0),
        world=2,
        strategy=cell.strategy,
        lora=spec.method.lora.model_dump() if spec.method.lora else None,
        full=False if method.lora is not None else spec.method.full or FullSpec(),
        quantization=method.quantization,
        training={
            "max_steps": 2,
            "global_batch_size": 4,
            "objective": method.objective,
            "learning_rate": method.rate,
        },
        test=_rows(method, 3, 1) if method.objective == "supervised" else _rows(method, 6, 0),
    )
    (folder / many.MAY_BE_REFUSED).touch()
    return job


def _rows(method: Method, count: int, seed: int) -> list[dict[str, str]]:
    made = [{**row, "prompt": f"<tool> {row['prompt']}"} for row in pairs(count, seed)]
    if method.objective == "supervised":
        return made
    others = pairs(count, seed + 50)
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{other['completion']} no"}
        for row, other in zip(made, others, strict=True)
    ]


def _spec(cell: Cell) -> Any:
    family, method = FAMILIES[cell.family], METHODS[cell.method]
    names = {"{embedding}": family.embedding, "{layer}": family.layer}

    def own(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: [names.get(item, item) for item in value] if isinstance(value, list) else value
            for key, value in settings.items()
        }

    small = {"rank": 4, "alpha": 8, "dropout": 0, "targetModules": list(family.targets)}
    chosen = (
        {"type": "lora", "lora": {**small, **own(method.lora)}}
        if method.lora is not None
        else {"type": "full", "full": own(method.full or {})}
    )
    return parse(
        {
            "apiVersion": "finetune-operator.io/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "cell"},
            "spec": {
                "model": {"uri": "hf://tiny/model", "quantization": method.quantization},
                "dataset": {"uri": "s3://data/train.jsonl"},
                "method": chosen,
                "training": {"objective": method.objective},
                "distribution": {"strategy": cell.strategy, "processesPerNode": 2},
                "output": {"uri": "s3://models/cell"},
            },
        }
    ).spec


def _refused_by_the_api(error: ValidationError) -> str:
    return "; ".join(errors.describe(error)).removeprefix("spec.")


def _together(jobs: Mapping[Cell, Job]) -> dict[Cell, Outcome]:
    """In the same two processes; what they didn't come to, or died of, is tried once more by itself."""
    first = next(iter(jobs.values()))
    group = Ranks(first, [job.scratch for job in jobs.values()]).wait(60 + 20 * len(jobs))
    found: dict[Cell, Outcome] = {}
    for cell, job in jobs.items():
        codes = group.codes
        if not _is_over(job):
            (job.scratch / "events.again").touch()
            codes = job.finish().codes
        found[cell] = _outcome(Ended(job.paths, codes, ""))
    return found


def _is_over(job: Job) -> bool:
    told = Ended(job.paths, (), "").events(events.PhaseEvent)
    return bool(Ended(job.paths, (), "").events(events.ErrorEvent)) or any(event.phase == "done" for event in told)


def _outcome(ended: Ended) -> Outcome:
    refused = ended.events(events.ErrorEvent)
    if refused:
        last = refused[-1]
        expected = last.reason in ("InvalidConfig", "ModelInvalid") and not last.traceback
        return Outcome(why=last.message) if expected else Outcome(wrong=f"{last.reason}: {last.message}")
    if not ended.events(events.SavedEvent):
        return Outcome(wrong=f"ended with {ended.codes}")
    return Outcome(losses=tuple(ended.losses), ended=ended)


def _judge(cell: Cell, found: Mapping[Cell, Outcome], cache: Path) -> None:
    mine = found[cell].ended
    assert mine is not None
    by_ddp = found.get(Cell(cell.family, cell.method, "ddp"))
    if by_ddp is not None and by_ddp.losses:
        apart = max(abs(a - b) for a, b in zip(mine.losses, by_ddp.losses, strict=True))
        if apart > _CLOSE:
            found[cell].wrong = f"losses {mine.losses} aren't ddp's {by_ddp.losses}"
    told = mine.evals("test")[2]
    objective = METHODS[cell.method].objective
    found[cell].wrong = _unlearnt(objective, mine.losses[0], mine.evals("test")[0], told) or found[cell].wrong
    if objective == "dpo":  # the run itself compared the logits of what it wrote
        return
    loaded = reload.loss(reload.result(mine, **reload.quantized(METHODS[cell.method].quantization)), mine, cache)
    if abs(told - loaded) > _CLOSE:
        found[cell].wrong = f"told a test loss of {told:.6f}, but what was written gives {loaded:.6f}"


def _unlearnt(objective: str, first: float, before: float, after: float) -> str:
    """What is wrong with the losses of the first step and of the test rows, or nothing. Pure."""
    if objective == "dpo" and max(abs(first - math.log(2)), abs(before - math.log(2))) > _CLOSE:
        return f"pairs begin at {before:.6f}, the first step at {first:.6f}, and not at log 2"
    if not after < before:
        return f"learnt nothing: test loss {before:.6f} before, {after:.6f} after"
    return ""


def page(found: Mapping[Cell, Outcome]) -> str:
    """docs/families.md. Pure."""
    notes: list[str] = []
    lines = [
        "<!-- Written by `make matrix`, which runs every cell that isn't marked \"Not run yet\"; don't edit. -->",
        "# Families, methods, strategies",
        "",
        f"Run with a small model of the family's real class on two processes, by each of {', '.join(STRATEGIES)}.",
        "✓ says: every strategy gave ddp's losses, the test loss fell (of DPO: from log 2, that of the pairs it",
        "learnt from, after two steps), and what was written gives the reported test loss when Transformers and PEFT",
        "load it on the base as it was (of DPO: the logits that were trained). A number is a note: which strategies",
        "are refused there, before anything is trained, and why; or what an older run didn't look at. – is refused by",
        "all.",
        f"{sum(outcome.holds for outcome in found.values())} of {len(found)} cells ran. Not run on a GPU yet.",
        "",
        f"| family | {' | '.join(METHODS)} |",
        f"| --- |{' --- |' * len(METHODS)}",
    ]
    for key, family in FAMILIES.items():
        cells = [_cell({s: found.get(Cell(key, method, s), _UNKNOWN) for s in STRATEGIES}, notes) for method in METHODS]
        lines.append(f"| {family.title} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    return "\n".join(lines)


def _cell(by_strategy: Mapping[str, Outcome], notes: list[str]) -> str:
    """✓, or the strategies that hold where they are fewer than those that don't, and the numbers of notes."""
    holding = [strategy for strategy, outcome in by_strategy.items() if outcome.holds]
    grouped: dict[str, list[str]] = {}
    for strategy, outcome in by_strategy.items():
        if not outcome.holds:
            grouped.setdefault(outcome.why or f"**wrong**: {outcome.wrong}", []).append(strategy)
        elif outcome.elsewhere:
            grouped.setdefault(_ELSEWHERE, []).append(strategy)
    numbers = []
    for reason, strategies in grouped.items():
        note = reason if len(strategies) == len(by_strategy) else f"{', '.join(strategies)}: {reason}"
        if note not in notes:
            notes.append(note)
        numbers.append(f"[{notes.index(note) + 1}]")
    many = 2 * len(holding) > len(by_strategy)
    return " ".join(["✓" if many else ", ".join(holding) or "–", *numbers])


def main(arguments: list[str]) -> int:
    """`--families a,b --methods c --strategies d`: a part; the page isn't written then. `--results FILE`: where what
    came of cells is kept, instead of the cache's file of this very code. What holds or was refused isn't run again."""
    chosen = dict(zip((a.removeprefix("--") for a in arguments[::2]), arguments[1::2], strict=True))
    families, methods, strategies = (
        chosen[name].split(",") if name in chosen else list(everything)
        for name, everything in (("families", FAMILIES), ("methods", METHODS), ("strategies", STRATEGIES))
    )
    kept = Path(chosen["results"]) if "results" in chosen else _kept()
    found = _read(kept)
    for family in families:
        for strategy in strategies:  # ddp comes first: the others are compared with it
            wanted = [Cell(family, method, strategy) for method in methods]
            missing = [cell for cell in wanted if cell not in found or found[cell].wrong]
            if missing:
                found |= _run_and_keep(missing, found, kept)
        told = [found[Cell(family, method, strategy)] for method in methods for strategy in strategies]
        print(f"{family}: {sum(outcome.holds for outcome in told)} of {len(told)} cells run", flush=True)
    asked = {Cell(family, m, s) for family in families for m in methods for s in strategies}
    if not chosen.keys() - {"results"}:
        _PAGE.write_text(page(found))
    return 1 if any(found[cell].wrong for cell in asked) else 0


def _run_and_keep(cells: list[Cell], found: Mapping[Cell, Outcome], kept: Path) -> dict[Cell, Outcome]:
    with tempfile.TemporaryDirectory() as root:
        new = run(Path(root), cells, found)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        file.writelines(json.dumps([*astuple(c), o.why, o.wrong, o.losses, o.elsewhere]) + "\n" for c, o in new.items())
    for cell, outcome in new.items():
        if outcome.wrong:
            print(f"  WRONG {cell}: {outcome.wrong}", flush=True)
    return new


def _kept() -> Path:
    """Outside the checkout, named by all that decides what comes of a cell."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("FINETUNE_CACHE") or Path(home) / "finetune-operator")
    whole = hashlib.sha256()
    for path in sorted(path for pattern in _DECIDING for path in _ROOT.glob(pattern)):
        whole.update(f"{path.relative_to(_ROOT)} ".encode() + path.read_bytes())
    return cache / "matrix" / f"{whole.hexdigest()[:32]}.jsonl"


def _read(kept: Path) -> dict[Cell, Outcome]:
    """A cell's last line counts; a line that was cut off doesn't. Older lines don't say where a loss fell."""
    found = {}
    for line in kept.read_text().splitlines(keepends=True) if kept.is_file() else ():
        if line.endswith("\n"):
            family, method, strategy, why, wrong, losses, *rest = json.loads(line)
            (elsewhere,) = rest or [METHODS[method].objective == "dpo"]
            found[Cell(family, method, strategy)] = Outcome(why, wrong, tuple(losses), elsewhere)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
