"""Optimizers: which weights each takes, what a step does, and that their state goes out and in without a trace."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers.optimization import Adafactor

from finetune_api import events
from finetune_api.resource import LoraSpec, TrainingSpec
from finetune_api.spec_recipe import AdamSpec
from finetune_trainer import adapters, freezing, manifest_io, model, optimizers
from finetune_trainer.failure import Failed
from finetune_trainer.learner import trained
from finetune_trainer.optimizers import Optimizer, Recipe
from trainer.forked import Die
from trainer.ranks import Ended, Job, at_once, finish_each, pairs, prepare

_KINDS = ["adamw", "adamw_8bit", "adafactor", "muon"]
_LARGE = LoraSpec(
    rank=128, alpha=256, target_modules=("q_proj", "o_proj")
)  # in smaller matrices bitsandbytes keeps 32 bits
_RATES = [3e-3, 1e-3, 2e-3, 1e-3, 5e-4, 1e-4]


@pytest.fixture(scope="module")
def base(models: dict[str, Path]) -> model.Loaded:
    return model.load(models["llama"], dtype=torch.float32, longest=96)


@pytest.fixture(params=["lora", "full"])
def fresh(request: pytest.FixtureRequest, base: model.Loaded) -> Any:
    """A model that nobody else has."""
    loaded = _copy(base)
    return (adapters.adapt(loaded, _LARGE, 1) if request.param == "lora" else freezing.unfreeze(loaded)).model


def _copy(base: model.Loaded) -> model.Loaded:
    network = copy.deepcopy(base.base)
    return replace(base, model=network, base=network)


def _fill_gradients(network: Any, step: int) -> None:
    torch.manual_seed(step)
    for parameter in trained(network).values():
        parameter.grad = torch.randn_like(parameter) * 0.1


def _learn(network: Any, optimizer: Optimizer, first: int, last: int) -> None:
    for number in range(first, last + 1):
        _fill_gradients(network, number)
        optimizer.step(_RATES[number - 1])
        optimizer.forget()


def _made(network: Any, **recipe: Any) -> Optimizer:
    return Optimizer(network, trained(network), Recipe(0.01, 1.0, **recipe))


@pytest.mark.parametrize("kind", _KINDS)
def test_state_that_went_through_a_file_leaves_no_trace(kind: str, fresh: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(fresh)
    whole, first = (_made(network, optimizer=kind, plus_ratio=4.0) for network in (fresh, other))
    before = {name: p.detach().clone() for name, p in trained(fresh).items()}
    _learn(fresh, whole, 1, 6)
    _learn(other, first, 1, 3)
    save_file(first.state(), tmp_path / "optimizer.safetensors")
    second = _made(other, optimizer=kind, plus_ratio=4.0)
    second.set_state(load_file(tmp_path / "optimizer.safetensors"), steps=3)
    _learn(other, second, 4, 6)
    assert all(not torch.equal(p, before[name]) for name, p in trained(fresh).items())
    for name, parameter in trained(fresh).items():
        assert torch.equal(parameter, trained(other)[name]), name
    ours, theirs = whole.state(), second.state()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_state_without_a_count_takes_the_checkpoints(fresh: Any) -> None:
    """ZeRO knows no count by parameter."""
    other = copy.deepcopy(fresh)
    whole, first = _made(fresh), _made(other)
    _learn(fresh, whole, 1, 6)
    _learn(other, first, 1, 3)
    second = _made(other)
    second.set_state({key: value for key, value in first.state().items() if not key.startswith("step/")}, steps=3)
    _learn(other, second, 4, 6)
    for name, parameter in trained(fresh).items():
        assert torch.equal(parameter, trained(other)[name]), name


def _theirs(network: Any, kind: str) -> list[Any]:
    """What a person would write by hand."""
    named = trained(network)
    matrices = [p for p in named.values() if p.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": [p for p in named.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if kind == "adafactor":
        return [Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False)]
    if kind == "muon":
        hidden = [p for n, p in named.items() if p.dim() == 2 and "embed" not in n and not n.startswith("lm_head")]
        others = [p for p in named.values() if p.dim() == 2 and all(p is not h for h in hidden)]
        rest = [{"params": others, "weight_decay": 0.01}, groups[1]]
        muon = torch.optim.Muon(hidden, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW([g for g in rest if g["params"]] or [torch.zeros(1)], lr=0.0)]
    return [torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)]


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_steps_are_the_libraries_own(kind: str, fresh: Any) -> None:
    other = copy.deepcopy(fresh)
    _learn(fresh, _made(fresh, optimizer=kind), 1, 6)
    theirs = _theirs(other, kind)
    for number, rate in enumerate(_RATES, start=1):
        _fill_gradients(other, number)
        for optimizer in theirs:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    for name, parameter in trained(fresh).items():
        assert (parameter - trained(other)[name]).abs().max() < 1e-6, name


def test_eight_bits_stay_near_thirty_two(base: model.Loaded) -> None:
    eight, thirty_two = (adapters.adapt(_copy(base), _LARGE, 1).model for _ in range(2))
    before = [p.detach().clone() for p in trained(eight).values()]
    optimizer = _made(eight, optimizer="adamw_8bit")
    _learn(eight, optimizer, 1, 6)
    _learn(thirty_two, _made(thirty_two), 1, 6)
    kinds = {value.dtype for name, value in optimizer.state().items() if name.startswith(("state1/", "state2/"))}
    assert kinds == {torch.uint8}
    ends = list(zip(trained(thirty_two).values(), trained(eight).values(), before, strict=True))
    moved = sum(float((p.detach() - b).abs().sum()) for p, _, b in ends)
    apart = sum(float((p.detach() - q.detach()).abs().sum()) for p, q, _ in ends)
    assert 0 < apart < 0.05 * moved


def test_embeddings_keep_thirty_two_bits(base: model.Loaded) -> None:
    network = freezing.unfreeze(_copy(base)).model
    assert network.get_input_embeddings().weight.numel() >= 4096  # under which all keep them
    optimizer = _made(network, optimizer="adamw_8bit")
    _learn(network, optimizer, 1, 1)
    assert optimizer.state()["exp_avg/model.embed_tokens.weight"].dtype == torch.float32


def test_lora_plus_is_pefts(base: model.Loaded) -> None:
    ours = adapters.adapt(_copy(base), LoraSpec(rank=4, alpha=8), 1).model
    theirs = copy.deepcopy(ours)
    _learn(ours, _made(ours, plus_ratio=16.0), 1, 6)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01
    )
    ratios = [group["lr"] for group in optimizer.param_groups]
    for number, rate in enumerate(_RATES, start=1):
        _fill_gradients(theirs, number)
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = rate * ratio
        optimizer.step()
    for name, parameter in trained(ours).items():
        assert (parameter - trained(theirs)[name]).abs().max() < 1e-6, name


def test_a_recipe_says_why_and_what_cant_be_split_is_refused() -> None:
    training = TrainingSpec(optimizer="paged_adamw_8bit", adam=AdamSpec(beta2=0.95))
    lora = LoraSpec(plus_ratio=16.0)
    on_cpu, on_gpu = (optimizers.recipe(training, lora, device) for device in ("cpu", "cuda"))
    assert (on_cpu.optimizer, on_gpu.optimizer) == ("adamw_8bit", "paged_adamw_8bit")
    assert on_cpu.betas == (0.9, 0.95)
    assert "no GPU" in optimizers.reason(training, on_cpu, "ddp")
    assert "16 times as fast" in optimizers.reason(training, on_gpu, "ddp")


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp"])
def test_what_computes_with_whole_matrices_isnt_cut(kind: Any, strategy: str) -> None:
    training = TrainingSpec(optimizer=kind)
    refused = rf"training\.optimizer: {kind} \w+ .*, and distribution\.strategy {strategy} cuts .*; use strategy ddp"
    with pytest.raises(Failed, match=refused):
        optimizers.reason(training, optimizers.recipe(training, None, "cpu"), strategy)


_WAYS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"training": {"optimizer": "adamw_8bit"}, "lora": {"rank": 128, "dropout": 0.1}},
    "adafactor, LoRA+": {"training": {"optimizer": "adafactor"}, "lora": {"plus_ratio": 8.0, "dropout": 0.1}},
    "muon, full": {"training": {"optimizer": "muon", "learning_rate": 1e-3}, "full": True},
    "by length, padded": {
        "training": {"group_by_length": True, "adam": AdamSpec(beta2=0.95), "scheduler": "wsd", "decay_ratio": 0.5},
        "data": {"packing": False},
    },
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, tuple[Ended, Ended]]:
    """By way: a run of two epochs, and one that goes on where another was killed in the midst of the second."""
    root = tmp_path_factory.mktemp("optimizers")

    def job(name: str, folder: str, resume: Path | None = None) -> Job:
        way = {**_WAYS[name], "training": {"max_steps": 6, "keep_best": False, **_WAYS[name].get("training", {})}}
        return prepare(root / name / folder, models["llama"], pairs(21), every=2, resume=resume, **way)

    def point(name: str) -> Path:
        killed = job(name, "killed")
        assert killed.start(die=Die("/step-6")).died().codes == (-9,)
        middle = manifest_io.newest_complete(killed.paths.checkpoints)
        assert middle == killed.paths.checkpoints / "step-4"
        return middle

    points = dict(zip(_WAYS, at_once([partial(point, name) for name in _WAYS]), strict=True))
    whole = finish_each({name: job(name, "whole") for name in _WAYS})
    resumed = finish_each({name: job(name, "resumed", points[name]) for name in _WAYS})
    return {name: (whole[name], resumed[name]) for name in _WAYS}


@pytest.mark.parametrize("way", _WAYS)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(way: str, done: dict[str, tuple[Ended, Ended]]) -> None:
    whole, resumed = done[way]
    assert resumed.losses == whole.losses[4:]
    assert len(resumed.losses) == 2
    for name in ("weights.safetensors", "optimizer.safetensors"):
        ours, theirs = (run.paths.checkpoints / "step-6" / name for run in (whole, resumed))
        assert ours.read_bytes() == theirs.read_bytes()


def test_choices_of_the_recipe_are_told_with_their_reasons(done: dict[str, tuple[Ended, Ended]]) -> None:
    assert done["adamw_8bit"][0].decision("optimizer").choice == "adamw_8bit"
    assert "8 times as fast" in done["adafactor, LoRA+"][0].decision("optimizer").reason
    order = done["by length, padded"][0].decision("order")
    assert order.choice == "by length"
    assert "in random order" in order.reason
    (plan,) = done["by length, padded"][0].events(events.PlanEvent)
    assert f"{plan.padding_share:.1%} of what is computed is padding" in order.reason
