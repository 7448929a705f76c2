"""An instruction in front of every example is computed once, and nothing but the work changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune_api import events
from trainer.ranks import Ended, finish_each, pairs, prepare

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
def ended(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[tuple[str, str], Ended]:
    """By way, and whether sharing is on."""
    root = tmp_path_factory.mktemp("shared")
    jobs = {}
    for way, options in _WAYS.items():
        for choice in ("auto", "off"):
            known = {"data": {"shared_prefix": choice, "max_sequence_length": 128}, "validation": 0.2, **options}
            jobs[way, choice] = prepare(root / str(len(jobs)), models[known.pop("family", "llama")], _ROWS, **known)
    return finish_each(jobs)


@pytest.mark.parametrize("way", _WAYS)
def test_losses_evaluations_and_weights_stay_the_same(way: str, ended: dict[tuple[str, str], Ended]) -> None:
    shared, apart = ended[way, "auto"], ended[way, "off"]
    assert shared.decision("sharedPrefix").choice == "on"
    assert apart.decision("sharedPrefix").choice == "off"
    assert shared.losses == pytest.approx(apart.losses, abs=2e-5)
    assert shared.evals("validation") == pytest.approx(apart.evals("validation"), abs=2e-5)
    name = "model.safetensors" if "full" in way else "adapter_model.safetensors"
    ours, theirs = (load_file(run.paths.export / name) for run in (shared, apart))
    for key, tensor in theirs.items():
        assert (ours[key].float() - tensor.float()).abs().max() < 1e-3, key


def test_the_saving_is_told_before_the_start(ended: dict[tuple[str, str], Ended]) -> None:
    told = {choice: ended["llama", choice].events(events.PlanEvent)[0] for choice in ("auto", "off")}
    assert told["off"].computed_share == 1.0
    assert told["auto"].computed_share < 0.7
    assert told["auto"].tokens_per_epoch == told["off"].tokens_per_epoch
    assert "computed once" in ended["llama", "auto"].decision("sharedPrefix").reason
