"""Every family trains with LoRA on two ranks, and what is written loads on its base. `make matrix` runs all cells."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api import events
from trainer import matrix, naive, stock
from trainer.matrix import FAMILIES, METHODS, Cell, Outcome
from trainer.ranks import finish_all, pairs, prepare

_SLICE = [*(Cell(family, "all-linear", "ddp") for family in FAMILIES), Cell("llama", "modulesToSave", "fsdp")]
_SLICE += [Cell("gemma2", "DPO", "ddp")]
_PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Outcome]:
    return matrix.run(tmp_path_factory.mktemp("families"), _SLICE)


@pytest.mark.parametrize("cell", _SLICE, ids=lambda cell: "-".join(astuple(cell)))
def test_a_family_trains_and_its_adapter_loads(cell: Cell, found: dict[Cell, Outcome]) -> None:
    assert found[cell].holds, found[cell]


def test_the_page_tells_of_every_family_and_method_and_of_nothing_wrong() -> None:
    page = _PAGE.read_text()
    for family in FAMILIES.values():
        assert f"| {family.title} |" in page
    assert f"| family | {' | '.join(METHODS)} |" in page
    assert "**wrong**" not in page
    assert "✓" in page


def test_a_cell_that_differs_or_is_refused_isnt_shown_as_run() -> None:
    found = {
        Cell(family, method, strategy): Outcome(wrong="losses differ")
        if strategy == "fsdp"
        else Outcome(why="not with zero3")
        if strategy == "zero3"
        else Outcome()
        for family in FAMILIES
        for method in METHODS
        for strategy in matrix.STRATEGIES
    }
    page = matrix.page(found)
    assert "| ✓ [1] [2] |" in page
    assert "1. zero3: not with zero3\n2. fsdp: **wrong**: losses differ" in page


def test_a_cell_says_which_strategies_hold_where_most_dont() -> None:
    refused = Outcome(why="no")
    notes: list[str] = []
    of = dict.fromkeys(matrix.STRATEGIES, refused)
    assert matrix._cell({**of, "ddp": Outcome()}, notes) == "ddp [1]"
    assert matrix._cell(of, notes) == "– [2]"
    assert notes == ["zero1, zero2, zero3, fsdp: no", "no"]


@pytest.mark.parametrize(
    ("objective", "first", "before", "after", "said"),
    [
        ("dpo", 0.693147, 0.693147, 0.687933, ""),
        ("dpo", 0.693147, 0.693147, 0.693147, "learnt nothing: test loss 0.693147 before, 0.693147 after"),
        ("dpo", 0.693147, 0.693147, 0.698436, "learnt nothing: test loss 0.693147 before, 0.698436 after"),
        ("dpo", 0.693147, 0.693147, float("nan"), "learnt nothing: test loss 0.693147 before, nan after"),
        ("dpo", 0.7, 0.693147, 0.6, "pairs begin at 0.693147, the first step at 0.700000, and not at log 2"),
        ("dpo", 0.693147, 0.7, 0.6, "pairs begin at 0.700000, the first step at 0.693147, and not at log 2"),
        ("supervised", 5.7, 5.8, 5.6, ""),
        ("supervised", 5.7, 5.8, 5.8, "learnt nothing: test loss 5.800000 before, 5.800000 after"),
    ],
)
def test_a_loss_that_didnt_fall_and_pairs_that_dont_begin_at_log_two_are_wrong(
    objective: str, first: float, before: float, after: float, said: str
) -> None:
    assert matrix._unlearnt(objective, first, before, after) == said


def test_pairs_are_measured_where_they_learn(tmp_path: Path) -> None:
    base = matrix._base(tmp_path / "base", FAMILIES["gemma2"])
    paths = matrix._job(tmp_path / "job", base, Cell("gemma2", "DPO", "ddp")).paths
    assert paths.data("test").read_text() == paths.data("train").read_text()


def test_an_older_run_of_pairs_is_told_as_such(tmp_path: Path) -> None:
    kept, lines = tmp_path / "kept.jsonl", []
    for strategy in matrix.STRATEGIES:
        lines.append(["llama", "DPO", strategy, "", "", [0.7]])
        lines.append(["gemma2", "DPO", strategy, "", "", [0.7], False])
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, notes = matrix._read(kept), list[str]()
    cells = [
        matrix._cell({s: found[Cell(family, "DPO", s)] for s in matrix.STRATEGIES}, notes)
        for family in ("llama", "gemma2")
    ]
    assert cells == ["✓ [1]", "✓"]
    assert notes == ["an older run: the loss that fell was that of three pairs that it didn't learn from"]


def test_what_was_kept_of_an_interrupted_run_isnt_run_again(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    lines = [["llama", "LoRA", "ddp", "", "", [1.5]], ["llama", "LoRA", "zero3", "no", "", []]]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines) + '["llama", "LoRA", "fs')
    assert matrix._read(kept) == {
        Cell("llama", "LoRA", "ddp"): Outcome(losses=(1.5,)), Cell("llama", "LoRA", "zero3"): Outcome(why="no"),
    }  # fmt: skip
    asked = ["--families", "llama", "--methods", "LoRA", "--strategies", "ddp,zero3", "--results", str(kept)]
    assert matrix.main(asked) == 0


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_the_stock_trainers_t5_loss_is_wrong_by_accumulation_and_ranks_and_ours_is_right(
    ranks: int, accumulation: int, tmp_path: Path, models: dict[str, Path]
) -> None:
    """T5's forward takes a mean over its micro-batch; only with one micro-batch a step is that the batch's mean. Our
    gradients, by every cut and strategy: test_averages."""
    training = {"max_steps": 1, "micro_batch_size": 8 // (ranks * accumulation), "max_grad_norm": 0.0}
    how: dict[str, Any] = {"full": True, "data": {"packing": False}, "training": training, "world": ranks}
    job = prepare(tmp_path / "job", models["t5"], pairs(8), **how)
    exact, slopes = naive.gradients(job, tmp_path / "tokens")
    (ours,) = finish_all([job])
    assert ours.losses == pytest.approx([exact], abs=1e-6)
    norm = float(torch.stack([slope.norm() for slope in slopes.values()]).norm())
    assert ours.events(events.StepEvent)[0].grad_norm == pytest.approx(norm, rel=1e-4)
    rows = naive.examples(job, tmp_path / "tokens")
    listed = []
    for index in range(len(rows)):
        ids, source = rows.example(index)[0].tolist(), int(rows.sources[index])
        listed.append({"input_ids": ids[:source], "attention_mask": [1] * source, "labels": ids[source:]})
    theirs = stock.gradient(models["t5"], listed, tmp_path / "theirs", ranks=ranks, accumulation=accumulation)
    name = "decoder.block.0.layer.0.SelfAttention.q.weight"
    off = float((theirs[name] - slopes[name]).norm() / slopes[name].norm())
    assert off < 1e-5 if ranks * accumulation == 1 else off > 0.02
