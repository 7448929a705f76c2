"""Ranks that share rows of a quantized base, or that split the optimizer state, compute what one
rank computes from whole rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages import events
from finetune_api.reasons import REASONS
from testkit.rows import pairs
from trainer.support.fault_injection import Fault
from trainer.support.rank_runs import Job, RunningRanks, finish_each, prepare

_CELLS: dict[str, dict[str, Any]] = {
    "LoRA, zero1": {"strategy": "zero1"},
    "full, zero1": {"strategy": "zero1", "full": True},
    "nf4, ddp": {"quantization": "nf4", "lora": {"target_modules": ("all-linear",), "dropout": 0.0}},
    "nf4, fsdp": {"quantization": "nf4", "strategy": "fsdp"},
    "nf4, ddp, bfloat16, recomputed": {"quantization": "nf4", "dtype": "bfloat16", "recompute": "selective"},
    "int8, ddp": {"quantization": "int8"},
}


def test_quantized_bases_and_zero1_give_the_losses_of_whole_rows(models: dict[str, Path], tmp_path: Path) -> None:
    jobs = {
        (cell, ranks): _job(tmp_path / f"{index}-{ranks}", models["llama"], cell, ranks)
        for index, cell in enumerate(_CELLS)
        for ranks in (1, 2)
    }
    runs = finish_each(jobs)
    for cell, options in _CELLS.items():
        shared, whole = runs[cell, 2].check(), runs[cell, 1].check()
        assert shared.decision("sequenceParallel").choice == "2"
        tolerance = 5e-3 if "dtype" in options or options.get("quantization") == "int8" else 1e-5
        assert shared.losses == pytest.approx(whole.losses, rel=tolerance), cell
        assert shared.evals("validation") == pytest.approx(whole.evals("validation"), rel=tolerance), cell


def _job(folder: Path, base: Path, cell: str, ranks: int) -> Job:
    options = dict(_CELLS[cell])
    training = {"max_steps": 4, "eval_every_steps": 2, "global_batch_size": 8}
    if "recompute" in options:
        training["activation_checkpointing"] = options.pop("recompute")
    return prepare(
        folder, base, pairs(24), validation=pairs(5, 1), world=ranks, sequence=ranks, training=training, **options
    )


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_a_rank_without_memory_does_not_leave_the_others_of_its_group_waiting(
    strategy: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """The others are in the middle of an exchange, so the attempt ends instead of the step."""
    job = prepare(tmp_path / "job", models["llama"], pairs(24), world=2, sequence=2, strategy=strategy)
    ended = RunningRanks(job, faults={1: Fault("memory", 1)}).wait(120)
    assert ended.codes[1] == REASONS["OutOfMemory"].exit_code
    assert not ended.events(events.BackoffEvent)
