"""Family x method x strategy: each cell is run on two ranks, or rejected with a reason.

`make matrix` writes the outcomes to docs/families.md; test_families runs a slice. Outcomes are
stored outside the checkout, in a file that is named by a digest of the code that ran, so an
interrupted run resumes.

A cell holds if its losses are those of ddp, if its test loss fell, and if the result loads with
Transformers and PEFT alone, on the original base, with the test loss that the run reported. With
preference pairs, the test rows are the training rows: what two steps on six pairs do to other pairs
says little about whether training works.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from finetune_api import errors
from finetune_api.messages import events
from finetune_api.resource import FullSpec, LoraSpec, parse
from finetune_trainer.model import experts, loading, lora
from testkit import tiny_families, tiny_models
from testkit.rows import pairs
from trainer.support import result_loading, run_sequence
from trainer.support.rank_runs import FinishedRun, Job, RunningRanks, prepare

_ROOT = Path(__file__).parents[3]
_PAGE = _ROOT / "docs" / "families.md"
_SOURCES = (
    "uv.lock", "operator/finetune_api/**/*.py", "trainer_image/finetune_trainer/**/*.py",
    "tests/testkit/tiny_families.py", "tests/testkit/tiny_models.py",
    "tests/trainer/support/family_matrix.py", "tests/trainer/support/run_sequence.py",
    "tests/trainer/support/rank_runs.py", "tests/trainer/support/result_loading.py",
)  # fmt: skip
_BESIDES = (
    "Two things are run by other tests and aren't in the table:",
    "",
    "- fsdp holds a base in nf4, too ([0038](decisions/0038-quantized-bases-under-fsdp.md)): its losses are",
    "  those of ddp, and it resumes to the bit (`tests/trainer/parallel/test_quantized_fsdp.py`, with Llama).",
    "  A note that says otherwise is from an older run.",
    "- Mixtures of experts (`tests/trainer/model/test_experts.py`): `all-linear` adapts attention and layers",
    "  outside of the experts, neither an expert nor a router, and the log says so. A router can be named; a",
    "  name of an expert's weights is refused, because they are no linear layers.",
    "",
)
_CODE = ("operator", "trainer_image", "tests/testkit", "tests/trainer/support")
_TOLERANCE = 2e-4  # the largest difference of two losses: float32, summed in another order


@dataclass(frozen=True)
class Family:
    """A family of models. `targets` are the layers that LoRA adapts; `embedding` and `layer` are
    names that a method needs."""

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
    "gemma3-images": Family("Gemma 3 with images (its text part)", tiny_families.tiny_gemma3_multimodal),
    "falcon": Family("Falcon", tiny_families.tiny_falcon, ("query_key_value",), "word_embeddings", "*h.1.*"),
    "mixtral": Family("Mixtral", tiny_models.tiny_mixtral),
    "qwen2-moe": Family("Qwen 2 MoE", tiny_models.tiny_qwen2_moe),
    "qwen3-moe": Family("Qwen 3 MoE", tiny_models.tiny_qwen3_moe),
    "olmoe": Family("OLMoE", tiny_families.tiny_olmoe),
    "gpt-oss": Family("gpt-oss", tiny_models.tiny_gpt_oss),
    "deepseek-v3": Family("DeepSeek-V3", tiny_families.tiny_deepseek_v3, ("q_b_proj", "kv_b_proj")),
    "gpt2": Family("GPT-2", tiny_models.tiny_gpt2, ("c_attn",), "wte", "*h.1.*"),
    "t5": Family("T5", tiny_models.tiny_t5, ("q", "v"), "shared", "*block.1.*"),
    "flan-t5": Family("Flan-T5, T5 1.1", tiny_models.tiny_flan_t5, ("q", "v"), "shared", "*block.1.*"),
}


@dataclass(frozen=True)
class Method:
    """A method. `lora` and `full` are as in spec.method, with {embedding} and {layer} of the
    family."""

    lora: dict[str, Any] | None = None
    full: dict[str, Any] | None = None
    quantization: str = "none"
    objective: str = "supervised"
    rate: float = 1e-2  # low enough that two steps lower the loss


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
    """A family, a method and a strategy, by their keys."""

    family: str
    method: str
    strategy: str


@dataclass
class Outcome:
    """The outcome of a cell. `rejection` is the reason why it was rejected, and `failure` is what
    went wrong; both are empty if the cell holds."""

    rejection: str = ""
    failure: str = ""
    losses: tuple[float, ...] = ()
    revision: str = ""  # of the code that ran
    run: FinishedRun | None = field(default=None, repr=False)

    @property
    def holds(self) -> bool:
        return not self.rejection and not self.failure


_UNKNOWN = Outcome(rejection="Not run yet.")


def run(root: Path, cells: Iterable[Cell], known: Mapping[Cell, Outcome] | None = None) -> dict[Cell, Outcome]:
    """Runs cells, in one group of processes for each family and strategy. `known` are outcomes of
    other cells, to compare with."""
    chosen = list(cells)
    bases = {name: _base(root / "bases" / name, FAMILIES[name]) for name in {cell.family for cell in chosen}}
    outcomes: dict[Cell, Outcome] = {}
    jobs: dict[Cell, Job] = {}
    for index, cell in enumerate(chosen):
        try:
            jobs[cell] = _job(root / str(index), bases[cell.family], cell)
        except ValidationError as error:
            outcomes[cell] = Outcome(rejection=_api_rejection(error))
    for group in {(cell.family, cell.strategy): 0 for cell in jobs}:
        group_jobs = {cell: job for cell, job in jobs.items() if (cell.family, cell.strategy) == group}
        outcomes.update(_run_group(group_jobs))
    for cell in [cell for cell in chosen if cell in outcomes and outcomes[cell].run]:
        _check_result(cell, {**(known or {}), **outcomes}, root / f"tokens-{cell.family}-{cell.method}")
    revision = _revision()
    for outcome in outcomes.values():
        outcome.revision = revision
    return {cell: outcomes[cell] for cell in chosen}


def _revision() -> str:
    """Returns the commit of the code, with a plus sign if the code was changed since."""
    commit, changes = (
        subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False).stdout
        for arguments in (("rev-parse", "--short=9", "HEAD"), ("status", "--porcelain", "--", *_CODE))
    )
    return commit.strip() + ("+" if changes else "")


def _base(folder: Path, family: Family) -> Path:
    """Builds a model without the dropout of some families, so that runs can be compared."""
    path = family.build(folder) / "config.json"
    config = json.loads(path.read_text())
    no_dropout = {key: 0.0 for key, value in config.items() if "drop" in key and isinstance(value, float)}
    path.write_text(json.dumps({**config, **no_dropout}))
    return folder


def _job(folder: Path, base: Path, cell: Cell) -> Job:
    """Raises ValidationError if the API rejects the cell."""
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
    (folder / run_sequence.MAY_BE_REFUSED).touch()
    return job


def _rows(method: Method, count: int, seed: int) -> list[dict[str, str]]:
    rows = [{**row, "prompt": f"<tool> {row['prompt']}"} for row in pairs(count, seed)]
    if method.objective == "supervised":
        return rows
    other_rows = pairs(count, seed + 50)
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{other['completion']} no"}
        for row, other in zip(rows, other_rows, strict=True)
    ]


def _spec(cell: Cell) -> Any:
    family, method = FAMILIES[cell.family], METHODS[cell.method]
    names = {"{embedding}": family.embedding, "{layer}": family.layer}

    def with_names(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: [names.get(item, item) for item in value] if isinstance(value, list) else value
            for key, value in settings.items()
        }

    small = {"rank": 4, "alpha": 8, "dropout": 0, "targetModules": list(family.targets)}
    method_spec = (
        {"type": "lora", "lora": {**small, **with_names(method.lora)}}
        if method.lora is not None
        else {"type": "full", "full": with_names(method.full or {})}
    )
    return parse(
        {
            "apiVersion": "finetune-operator.io/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "cell"},
            "spec": {
                "model": {"uri": "hf://tiny/model", "quantization": method.quantization},
                "dataset": {"uri": "s3://data/train.jsonl"},
                "method": method_spec,
                "training": {"objective": method.objective},
                "distribution": {"strategy": cell.strategy, "processesPerNode": 2},
                "output": {"uri": "s3://models/cell"},
            },
        }
    ).spec


def _api_rejection(error: ValidationError) -> str:
    return "; ".join(errors.describe(error)).removeprefix("spec.")


def _run_group(jobs: Mapping[Cell, Job]) -> dict[Cell, Outcome]:
    """Runs jobs in the same two processes. A job that they didn't finish is run once more,
    alone."""
    first = next(iter(jobs.values()))
    group = RunningRanks(first, [job.scratch for job in jobs.values()]).wait(60 + 20 * len(jobs))
    outcomes: dict[Cell, Outcome] = {}
    for cell, job in jobs.items():
        codes = group.codes
        if not _is_over(job):
            (job.scratch / "events.again").touch()
            codes = job.finish().codes
        outcomes[cell] = _outcome(FinishedRun(job.paths, codes, ""))
    return outcomes


def _is_over(job: Job) -> bool:
    """Returns whether the run reported an error or its last phase."""
    run = FinishedRun(job.paths, (), "")
    phases = run.events(events.PhaseEvent)
    return bool(run.events(events.ErrorEvent)) or any(event.phase == "done" for event in phases)


def _outcome(run: FinishedRun) -> Outcome:
    error_events = run.events(events.ErrorEvent)
    if error_events:
        error = error_events[-1]
        expected = error.reason in ("InvalidConfig", "ModelInvalid") and not error.traceback
        return Outcome(rejection=error.message) if expected else Outcome(failure=f"{error.reason}: {error.message}")
    if not run.events(events.SavedEvent):
        return Outcome(failure=f"ended with {run.codes}")
    return Outcome(losses=tuple(run.losses), run=run)


def _check_result(cell: Cell, outcomes: Mapping[Cell, Outcome], cache: Path) -> None:
    """Compares a cell's run with that of ddp and with its written result, and sets `failure` if
    they differ."""
    run = outcomes[cell].run
    assert run is not None
    by_ddp = outcomes.get(Cell(cell.family, cell.method, "ddp"))
    if by_ddp is not None and by_ddp.losses:
        difference = max(abs(a - b) for a, b in zip(run.losses, by_ddp.losses, strict=True))
        if difference > _TOLERANCE:
            outcomes[cell].failure = f"losses {run.losses} aren't ddp's {by_ddp.losses}"
    reported = run.evals("test")[2]
    objective = METHODS[cell.method].objective
    outcomes[cell].failure = (
        _loss_failure(objective, run.losses[0], run.evals("test")[0], reported) or outcomes[cell].failure
    )
    if objective == "dpo":  # the run itself compared the logits of what it wrote
        return
    loaded = result_loading.loss(
        result_loading.result(run, **result_loading.quantized(METHODS[cell.method].quantization)), run, cache
    )
    if abs(reported - loaded) > _TOLERANCE:
        outcomes[cell].failure = f"reported a test loss of {reported:.6f}, but the written result gives {loaded:.6f}"


def _loss_failure(objective: str, first: float, before: float, after: float) -> str:
    """Returns what is wrong with the losses of the first step and of the test rows, or an empty
    string."""
    if objective == "dpo" and max(abs(first - math.log(2)), abs(before - math.log(2))) > _TOLERANCE:
        return f"pairs begin at {before:.6f}, the first step at {first:.6f}, and not at log 2"
    if not after < before:
        return f"the test loss didn't fall: {before:.6f} before, {after:.6f} after"
    return ""


def adapted(root: Path) -> dict[str, tuple[str, str]]:
    """Returns (the layers that all-linear adapts, what it leaves out of the experts) by family."""
    layers = {}
    for key, family in FAMILIES.items():
        loaded = loading.load(family.build(root / key), dtype=torch.bfloat16, longest=0, headers_only=True)
        mixture = experts.find(loaded.base)
        model = lora.adapt(loaded, LoraSpec(target_modules=("all-linear",)), 1).model
        names = lora.adapted_layers(model)
        left_out = [*mixture.parameters, *(name for name in mixture.routers if name not in names)]
        layers[key] = (", ".join(names), ", ".join(left_out))
    return layers


def page(outcomes: Mapping[Cell, Outcome], layers: Mapping[str, tuple[str, str]] | None = None) -> str:
    """Returns the text of docs/families.md. `layers` are what `adapted` returns."""
    notes: list[str] = []
    holding = sum(outcome.holds for outcome in outcomes.values())
    lines = [
        '<!-- Generated by `make matrix`, which runs every cell that isn\'t marked "Not run yet"; do not edit. -->',
        "# Families, methods, strategies",
        "",
        "Each cell was run on two processes, with a small model of the family's real class, and with each of",
        f"the strategies {', '.join(STRATEGIES)}.",
        "",
        "- ✓ means that every strategy, except those in a note, gave the losses of ddp; that the test loss",
        "  fell; and that the written result gives the reported test loss when Transformers and PEFT load it",
        "  on the original base. With DPO, the test pairs are the training pairs, their loss fell from log 2",
        "  within two steps, and the written result gives the logits of the trained model.",
        "- A number refers to a note: strategies that are rejected before anything is trained, with the",
        "  reason.",
        "- – means that all strategies are rejected.",
        "",
        f"{holding} of {len(outcomes)} cells hold; the others are rejected, as the notes say. {_revisions(outcomes)}",
        "None has run on a GPU yet.",
        "",
        f"| family | {' | '.join(METHODS)} |",
        f"| --- |{' --- |' * len(METHODS)}",
    ]
    for key, family in FAMILIES.items():
        cells = [
            _cell({s: outcomes.get(Cell(key, method, s), _UNKNOWN) for s in STRATEGIES}, notes) for method in METHODS
        ]
        lines.append(f"| {family.title} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), "", *_BESIDES, ""]
    lines += _layers_table(layers or {})
    return "\n".join(lines)


def _revisions(outcomes: Mapping[Cell, Outcome]) -> str:
    """Says which commits the cells were run at."""
    by_revision: dict[str, list[Cell]] = {}
    for cell, outcome in outcomes.items():
        by_revision.setdefault(outcome.revision, []).append(cell)
    most, *others = sorted(by_revision, key=lambda revision: len(by_revision[revision]), reverse=True) or [""]
    exceptions = "; ".join(f"{_named(by_revision[revision])} at {revision}" for revision in others)
    return f"They were run at revision {most}{f', except {exceptions}' if exceptions else ''}."


def _named(cells: Iterable[Cell]) -> str:
    """Names cells by family and method; a family whose methods are all there stands alone."""
    methods: dict[str, dict[str, None]] = {}
    for cell in cells:
        methods.setdefault(cell.family, {})[cell.method] = None
    return ", ".join(
        FAMILIES[family].title + ("" if len(names) == len(METHODS) else f" ({', '.join(names)})")
        for family, names in methods.items()
    )


def _layers_table(layers: Mapping[str, tuple[str, str]]) -> list[str]:
    return [
        "## What all-linear adapts",
        "",
        "Of a mixture of experts, it leaves out the weights of the experts and the router that is a linear layer;",
        "naming the router in `targetModules` adapts it, and `method.type: full` trains everything. Of a model that",
        "also reads images, only the part that reads text is adapted.",
        "",
        "| family | adapted | left out |",
        "| --- | --- | --- |",
        *(f"| {FAMILIES[key].title} | {names} | {left_out} |" for key, (names, left_out) in layers.items()),
        "",
    ]


def _cell(by_strategy: Mapping[str, Outcome], notes: list[str]) -> str:
    """Returns ✓, or the strategies that hold if they are fewer than those that don't, and the
    numbers of notes."""
    holding = [strategy for strategy, outcome in by_strategy.items() if outcome.holds]
    grouped: dict[str, list[str]] = {}
    for strategy, outcome in by_strategy.items():
        if not outcome.holds:
            grouped.setdefault(outcome.rejection or f"**wrong**: {outcome.failure}", []).append(strategy)
    numbers = []
    for reason, strategies in grouped.items():
        note = reason if len(strategies) == len(by_strategy) else f"{', '.join(strategies)}: {reason}"
        if note not in notes:
            notes.append(note)
        numbers.append(f"[{notes.index(note) + 1}]")
    most_hold = 2 * len(holding) > len(by_strategy)
    return " ".join(["✓" if most_hold else ", ".join(holding) or "–", *numbers])


def main(arguments: list[str]) -> int:
    """Runs the cells that no stored outcome shows to hold or to be rejected.

    `--families a,b --methods c --strategies d` selects a part; the page isn't written then.
    `--results FILE` stores the outcomes there instead of in the cache's file for this code.
    """
    chosen = dict(zip((a.removeprefix("--") for a in arguments[::2]), arguments[1::2], strict=True))
    families, methods, strategies = (
        chosen[name].split(",") if name in chosen else list(keys)
        for name, keys in (("families", FAMILIES), ("methods", METHODS), ("strategies", STRATEGIES))
    )
    results = Path(chosen["results"]) if "results" in chosen else _results_path()
    outcomes = _read_results(results)
    for family in families:
        for strategy in strategies:  # ddp comes first: the others are compared with it
            row = [Cell(family, method, strategy) for method in methods]
            missing = [cell for cell in row if cell not in outcomes or outcomes[cell].failure]
            if missing:
                outcomes |= _run_and_store(missing, outcomes, results)
        shown = [outcomes[Cell(family, method, strategy)] for method in methods for strategy in strategies]
        print(f"{family}: {sum(outcome.holds for outcome in shown)} of {len(shown)} cells run", flush=True)
    cells = {Cell(family, m, s) for family in families for m in methods for s in strategies}
    if not chosen.keys() - {"results"}:
        with tempfile.TemporaryDirectory() as root:
            _PAGE.write_text(page(outcomes, adapted(Path(root))))
    return 1 if any(outcomes[cell].failure for cell in cells) else 0


def _run_and_store(cells: list[Cell], outcomes: Mapping[Cell, Outcome], results: Path) -> dict[Cell, Outcome]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        new = run(Path(root), cells, outcomes)
    seconds = time.monotonic() - start
    print(f"  {cells[0].family} {cells[0].strategy}: {len(cells)} cells, {seconds:.0f} s", flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.writelines(
            json.dumps([*astuple(c), o.rejection, o.failure, o.losses, o.revision]) + "\n" for c, o in new.items()
        )
    for cell, outcome in new.items():
        if outcome.failure:
            print(f"  WRONG {cell}: {outcome.failure}", flush=True)
    return new


def _results_path() -> Path:
    """Returns a path outside the checkout, named by a digest of every file that decides the outcome
    of a cell."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("FINETUNE_CACHE") or Path(home) / "finetune-operator")
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in _ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(_ROOT)} ".encode() + path.read_bytes())
    return cache / "matrix" / f"{digest.hexdigest()[:32]}.jsonl"


def _read_results(results: Path) -> dict[Cell, Outcome]:
    """Reads stored outcomes. The last line of a cell counts, one that was cut off doesn't."""
    outcomes = {}
    for line in results.read_text().splitlines(keepends=True) if results.is_file() else ():
        if line.endswith("\n"):
            family, method, strategy, rejection, failure, losses, revision = json.loads(line)
            outcomes[Cell(family, method, strategy)] = Outcome(rejection, failure, tuple(losses), revision)
    return outcomes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
