"""Every family trains with LoRA on two ranks, and the result loads on its base. `make matrix` runs
all cells."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.messages import events
from testkit.rows import pairs
from trainer.support import family_matrix, reference_implementation, transformers_trainer
from trainer.support.family_matrix import FAMILIES, METHODS, STRATEGIES, Cell, Outcome
from trainer.support.rank_runs import finish_all, prepare

_SLICE = [*(Cell(family, "all-linear", "ddp") for family in FAMILIES), Cell("llama", "modulesToSave", "fsdp")]
_SLICE += [Cell("gemma2", "DPO", "ddp")]
_PAGE = Path(__file__).parents[3] / "docs" / "families.md"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Outcome]:
    return family_matrix.run(tmp_path_factory.mktemp("families"), _SLICE)


@pytest.mark.parametrize("cell", _SLICE, ids=lambda cell: "-".join(astuple(cell)))
def test_a_family_trains_and_its_adapter_loads(cell: Cell, outcomes: dict[Cell, Outcome]) -> None:
    assert outcomes[cell].holds, outcomes[cell]


def test_the_page_lists_every_family_and_method_and_no_failure() -> None:
    page = _PAGE.read_text()
    for family in FAMILIES.values():
        assert f"| {family.title} |" in page
    assert f"| family | {' | '.join(METHODS)} |" in page
    assert "**wrong**" not in page
    assert "✓" in page


def test_the_page_lists_what_all_linear_adapts(tmp_path: Path) -> None:
    layers = family_matrix.adapted(tmp_path)
    assert layers["qwen2-moe"][1] == "down_proj, gate_up_proj, shared_expert_gate"
    assert layers["gemma3-images"] == layers["gemma3"]
    page = _PAGE.read_text()
    for key, (names, left_out) in layers.items():
        assert f"| {FAMILIES[key].title} | {names} | {left_out} |" in page


def test_a_cell_that_fails_or_is_rejected_isnt_shown_as_run() -> None:
    outcomes = {
        Cell(family, method, strategy): Outcome(failure="losses differ")
        if strategy == "fsdp"
        else Outcome(rejection="not with zero3")
        if strategy == "zero3"
        else Outcome()
        for family in FAMILIES
        for method in METHODS
        for strategy in family_matrix.STRATEGIES
    }
    page = family_matrix.page(outcomes)
    assert "| ✓ [1] [2] |" in page
    assert "1. zero3: not with zero3\n2. fsdp: **wrong**: losses differ" in page


def test_a_cell_lists_the_strategies_that_hold_if_most_dont() -> None:
    rejected = Outcome(rejection="no")
    notes: list[str] = []
    outcomes = dict.fromkeys(family_matrix.STRATEGIES, rejected)
    assert family_matrix._cell({**outcomes, "ddp": Outcome()}, notes) == "ddp [1]"
    assert family_matrix._cell(outcomes, notes) == "– [2]"
    assert notes == ["zero1, zero2, zero3, fsdp: no", "no"]


@pytest.mark.parametrize(
    ("objective", "first", "before", "after", "failure"),
    [
        ("dpo", 0.693147, 0.693147, 0.687933, ""),
        ("dpo", 0.693147, 0.693147, 0.693147, "the test loss didn't fall: 0.693147 before, 0.693147 after"),
        ("dpo", 0.693147, 0.693147, 0.698436, "the test loss didn't fall: 0.693147 before, 0.698436 after"),
        ("dpo", 0.693147, 0.693147, float("nan"), "the test loss didn't fall: 0.693147 before, nan after"),
        ("dpo", 0.7, 0.693147, 0.6, "pairs begin at 0.693147, the first step at 0.700000, and not at log 2"),
        ("dpo", 0.693147, 0.7, 0.6, "pairs begin at 0.700000, the first step at 0.693147, and not at log 2"),
        ("supervised", 5.7, 5.8, 5.6, ""),
        ("supervised", 5.7, 5.8, 5.8, "the test loss didn't fall: 5.800000 before, 5.800000 after"),
    ],
)
def test_a_loss_that_didnt_fall_and_pairs_that_dont_begin_at_log_two_are_wrong(
    objective: str, first: float, before: float, after: float, failure: str
) -> None:
    assert family_matrix._loss_failure(objective, first, before, after) == failure


def test_pairs_are_evaluated_on_their_training_rows(tmp_path: Path) -> None:
    base = family_matrix._base(tmp_path / "base", FAMILIES["gemma2"])
    paths = family_matrix._job(tmp_path / "job", base, Cell("gemma2", "DPO", "ddp")).paths
    assert paths.data("test").read_text() == paths.data("train").read_text()


def test_the_page_says_which_revision_a_cell_was_run_at() -> None:
    outcomes = {Cell("llama", method, s): Outcome(revision="aaa") for method in METHODS for s in STRATEGIES}
    outcomes |= {Cell("gemma2", method, "ddp"): Outcome(revision="aaa") for method in METHODS}
    assert "They were run at revision aaa." in family_matrix.page(outcomes)
    outcomes |= {Cell("gpt2", method, "ddp"): Outcome(revision="bbb") for method in METHODS}
    outcomes[Cell("llama", "int8", "ddp")] = Outcome(revision="ccc+")
    expected = "They were run at revision aaa, except GPT-2 at bbb; Llama, SmolLM2 (tied) (int8) at ccc+."
    assert expected in family_matrix.page(outcomes)


def test_stored_outcomes_of_an_interrupted_run_arent_run_again(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    lines = [["llama", "LoRA", "ddp", "", "", [1.5], "aaa"], ["llama", "LoRA", "zero3", "no", "", [], "bbb"]]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines) + '["llama", "LoRA", "fs')
    assert family_matrix._read_results(results) == {
        Cell("llama", "LoRA", "ddp"): Outcome(losses=(1.5,), revision="aaa"),
        Cell("llama", "LoRA", "zero3"): Outcome(rejection="no", revision="bbb"),
    }  # fmt: skip
    arguments = ["--families", "llama", "--methods", "LoRA", "--strategies", "ddp,zero3", "--results", str(results)]
    assert family_matrix.main(arguments) == 0


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_the_stock_trainers_t5_loss_is_wrong_by_accumulation_and_ranks_and_ours_is_right(
    ranks: int, accumulation: int, tmp_path: Path, models: dict[str, Path]
) -> None:
    """T5's forward returns a mean over its micro-batch, which is the batch's mean only with one
    micro-batch per step. test_averages checks our gradients with every split and strategy."""
    training = {"max_steps": 1, "micro_batch_size": 8 // (ranks * accumulation), "max_grad_norm": 0.0}
    options: dict[str, Any] = {"full": True, "data": {"packing": False}, "training": training, "world": ranks}
    job = prepare(tmp_path / "job", models["t5"], pairs(8), **options)
    exact, expected = reference_implementation.gradients(job, tmp_path / "tokens")
    (run,) = finish_all([job])
    assert run.losses == pytest.approx([exact], abs=1e-6)
    norm = float(torch.stack([slope.norm() for slope in expected.values()]).norm())
    assert run.events(events.StepEvent)[0].grad_norm == pytest.approx(norm, rel=1e-4)
    rows = reference_implementation.examples(job, tmp_path / "tokens")
    features = []
    for index in range(len(rows)):
        ids, source = rows.example(index)[0].tolist(), int(rows.sources[index])
        features.append({"input_ids": ids[:source], "attention_mask": [1] * source, "labels": ids[source:]})
    theirs = transformers_trainer.gradient(
        models["t5"], features, tmp_path / "theirs", ranks=ranks, accumulation=accumulation
    )
    name = "decoder.block.0.layer.0.SelfAttention.q.weight"
    difference = float((theirs[name] - expected[name]).norm() / expected[name].norm())
    assert difference < 1e-5 if ranks * accumulation == 1 else difference > 0.02
