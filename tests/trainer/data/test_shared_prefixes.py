"""An instruction at the start of every example is computed once, and only the amount of work
changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune_api.messages import events
from testkit.rows import pairs
from trainer.support.rank_runs import FinishedRun, finish_each, prepare

_TEXT = "move the tower light ship again and aim about: "
_ROWS = [{**row, "prompt": _TEXT + row["prompt"]} for row in pairs(40)]
_WAYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2, full": {"family": "qwen2", "full": True},
    "gpt2": {"family": "gpt2", "lora": {"target_modules": ("c_attn",)}},
    "2 ranks": {"world": 2},
    "2 ranks, zero3": {"world": 2, "strategy": "zero3"},
    "2 ranks, fsdp": {"world": 2, "strategy": "fsdp"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[tuple[str, str], FinishedRun]:
    """Returns the runs by variant and by whether sharing is on."""
    root = tmp_path_factory.mktemp("shared")
    jobs = {}
    for way, variant in _WAYS.items():
        for choice in ("auto", "off"):
            options = {"data": {"shared_prefix": choice, "max_sequence_length": 128}, "validation": 0.2, **variant}
            jobs[way, choice] = prepare(root / str(len(jobs)), models[options.pop("family", "llama")], _ROWS, **options)
    return finish_each(jobs)


@pytest.mark.parametrize("way", _WAYS)
def test_losses_evaluations_and_weights_stay_the_same(way: str, runs: dict[tuple[str, str], FinishedRun]) -> None:
    shared, unshared = runs[way, "auto"], runs[way, "off"]
    assert shared.decision("sharedPrefix").choice == "on"
    assert unshared.decision("sharedPrefix").choice == "off"
    assert shared.losses == pytest.approx(unshared.losses, abs=2e-5)
    assert shared.evals("validation") == pytest.approx(unshared.evals("validation"), abs=2e-5)
    name = "model.safetensors" if "full" in way else "adapter_model.safetensors"
    ours, theirs = (load_file(run.paths.export / name) for run in (shared, unshared))
    for key, tensor in theirs.items():
        assert (ours[key].float() - tensor.float()).abs().max() < 1e-3, key


def test_the_saving_is_reported_before_the_first_step(runs: dict[tuple[str, str], FinishedRun]) -> None:
    plans = {choice: runs["llama", choice].events(events.PlanEvent)[0] for choice in ("auto", "off")}
    assert plans["off"].computed_share == 1.0
    assert plans["auto"].computed_share < 0.7
    assert plans["auto"].tokens_per_epoch == plans["off"].tokens_per_epoch
    assert "computed once" in runs["llama", "auto"].decision("sharedPrefix").reason
