"""Optimizers: which weights each one updates, what a step does, and that saving and loading their
state changes nothing."""

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

from finetune_api.messages import events
from finetune_api.resource import LoraSpec, TrainingSpec
from finetune_api.spec.recipe import AdamSpec
from finetune_trainer.errors import RunError
from finetune_trainer.model import freezing, loading
from finetune_trainer.model import lora as adapters
from finetune_trainer.parallel import optimizers
from finetune_trainer.parallel.optimizers import Optimizer, OptimizerConfig
from finetune_trainer.parallel.strategy import trained
from testkit.rows import pairs
from trainer.support.checkpoints import newest_complete
from trainer.support.forked_ranks import KillPoint
from trainer.support.rank_runs import FinishedRun, Job, finish_each, in_parallel, prepare

_KINDS = ["adamw", "adamw_8bit", "adafactor", "muon"]
# bitsandbytes uses 32 bits for smaller matrices.
_LARGE = LoraSpec(rank=128, alpha=256, target_modules=("q_proj", "o_proj"))
_RATES = [3e-3, 1e-3, 2e-3, 1e-3, 5e-4, 1e-4]


@pytest.fixture(scope="module")
def base(models: dict[str, Path]) -> loading.LoadedModel:
    return loading.load(models["llama"], dtype=torch.float32, longest=96)


@pytest.fixture(params=["lora", "full"])
def fresh(request: pytest.FixtureRequest, base: loading.LoadedModel) -> Any:
    """Returns a model that no other test uses."""
    loaded = _copy(base)
    return (adapters.adapt(loaded, _LARGE, 1) if request.param == "lora" else freezing.unfreeze(loaded)).model


def _copy(base: loading.LoadedModel) -> loading.LoadedModel:
    network = copy.deepcopy(base.base)
    return replace(base, model=network, base=network)


def _fill_gradients(network: Any, step: int) -> None:
    torch.manual_seed(step)
    for parameter in trained(network).values():
        parameter.grad = torch.randn_like(parameter) * 0.1


def _train(network: Any, optimizer: Optimizer, first: int, last: int) -> None:
    for number in range(first, last + 1):
        _fill_gradients(network, number)
        optimizer.step(_RATES[number - 1])
        optimizer.zero_grad()


def _optimizer(network: Any, **recipe: Any) -> Optimizer:
    return Optimizer(network, trained(network), OptimizerConfig(0.01, 1.0, **recipe))


@pytest.mark.parametrize("kind", _KINDS)
def test_saving_and_loading_the_state_changes_nothing(kind: str, fresh: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(fresh)
    uninterrupted, first = (_optimizer(network, optimizer=kind, plus_ratio=4.0) for network in (fresh, other))
    before = {name: p.detach().clone() for name, p in trained(fresh).items()}
    _train(fresh, uninterrupted, 1, 6)
    _train(other, first, 1, 3)
    save_file(first.state(), tmp_path / "optimizer.safetensors")
    second = _optimizer(other, optimizer=kind, plus_ratio=4.0)
    second.set_state(load_file(tmp_path / "optimizer.safetensors"), steps=3)
    _train(other, second, 4, 6)
    assert all(not torch.equal(p, before[name]) for name, p in trained(fresh).items())
    for name, parameter in trained(fresh).items():
        assert torch.equal(parameter, trained(other)[name]), name
    expected, restored = uninterrupted.state(), second.state()
    assert expected.keys() == restored.keys()
    for name, value in expected.items():
        assert torch.equal(value, restored[name]), name


def test_state_without_a_step_count_uses_the_checkpoints_step(fresh: Any) -> None:
    """ZeRO has no step count for each parameter."""
    other = copy.deepcopy(fresh)
    uninterrupted, first = _optimizer(fresh), _optimizer(other)
    _train(fresh, uninterrupted, 1, 6)
    _train(other, first, 1, 3)
    second = _optimizer(other)
    second.set_state({key: value for key, value in first.state().items() if not key.startswith("step/")}, steps=3)
    _train(other, second, 4, 6)
    for name, parameter in trained(fresh).items():
        assert torch.equal(parameter, trained(other)[name]), name


def _library_optimizers(network: Any, kind: str) -> list[Any]:
    """Returns the optimizers that a person would write by hand."""
    parameters = trained(network)
    matrices = [p for p in parameters.values() if p.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if kind == "adafactor":
        return [Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False)]
    if kind == "muon":
        hidden = [p for n, p in parameters.items() if p.dim() == 2 and "embed" not in n and not n.startswith("lm_head")]
        other_matrices = [p for p in parameters.values() if p.dim() == 2 and all(p is not h for h in hidden)]
        other_groups = [{"params": other_matrices, "weight_decay": 0.01}, groups[1]]
        muon = torch.optim.Muon(hidden, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW([g for g in other_groups if g["params"]] or [torch.zeros(1)], lr=0.0)]
    return [torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)]


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_steps_equal_those_of_the_libraries(kind: str, fresh: Any) -> None:
    other = copy.deepcopy(fresh)
    _train(fresh, _optimizer(fresh, optimizer=kind), 1, 6)
    library_optimizers = _library_optimizers(other, kind)
    for number, rate in enumerate(_RATES, start=1):
        _fill_gradients(other, number)
        for optimizer in library_optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    for name, parameter in trained(fresh).items():
        assert (parameter - trained(other)[name]).abs().max() < 1e-6, name


def test_eight_bits_stay_near_thirty_two(base: loading.LoadedModel) -> None:
    eight, thirty_two = (adapters.adapt(_copy(base), _LARGE, 1).model for _ in range(2))
    before = [p.detach().clone() for p in trained(eight).values()]
    optimizer = _optimizer(eight, optimizer="adamw_8bit")
    _train(eight, optimizer, 1, 6)
    _train(thirty_two, _optimizer(thirty_two), 1, 6)
    kinds = {value.dtype for name, value in optimizer.state().items() if name.startswith(("state1/", "state2/"))}
    assert kinds == {torch.uint8}
    weights = list(zip(trained(thirty_two).values(), trained(eight).values(), before, strict=True))
    change = sum(float((p.detach() - b).abs().sum()) for p, _, b in weights)
    difference = sum(float((p.detach() - q.detach()).abs().sum()) for p, q, _ in weights)
    assert 0 < difference < 0.05 * change


def test_embeddings_use_thirty_two_bits(base: loading.LoadedModel) -> None:
    network = freezing.unfreeze(_copy(base)).model
    assert network.get_input_embeddings().weight.numel() >= 4096  # smaller tensors always use 32 bits
    optimizer = _optimizer(network, optimizer="adamw_8bit")
    _train(network, optimizer, 1, 1)
    assert optimizer.state()["exp_avg/model.embed_tokens.weight"].dtype == torch.float32


def test_lora_plus_equals_pefts(base: loading.LoadedModel) -> None:
    network = adapters.adapt(_copy(base), LoraSpec(rank=4, alpha=8), 1).model
    peft_network = copy.deepcopy(network)
    _train(network, _optimizer(network, plus_ratio=16.0), 1, 6)
    optimizer = create_loraplus_optimizer(
        peft_network, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01
    )
    ratios = [group["lr"] for group in optimizer.param_groups]
    for number, rate in enumerate(_RATES, start=1):
        _fill_gradients(peft_network, number)
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = rate * ratio
        optimizer.step()
    for name, parameter in trained(network).items():
        assert (parameter - trained(peft_network)[name]).abs().max() < 1e-6, name


def test_the_choice_of_an_optimizer_has_a_reason() -> None:
    training = TrainingSpec(optimizer="paged_adamw_8bit", adam=AdamSpec(beta2=0.95))
    lora = LoraSpec(plus_ratio=16.0)
    on_cpu, on_gpu = (optimizers.optimizer_config(training, lora, device) for device in ("cpu", "cuda"))
    assert (on_cpu.optimizer, on_gpu.optimizer) == ("adamw_8bit", "paged_adamw_8bit")
    assert on_cpu.betas == (0.9, 0.95)
    assert "no GPU" in optimizers.reason(training, on_cpu, "ddp")
    assert "16 times as fast" in optimizers.reason(training, on_gpu, "ddp")


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp"])
def test_optimizers_of_full_matrices_reject_strategies_that_shard_them(kind: Any, strategy: str) -> None:
    training = TrainingSpec(optimizer=kind)
    message = rf"training\.optimizer: {kind} \w+ .*, and distribution\.strategy {strategy} cuts .*; use strategy ddp"
    with pytest.raises(RunError, match=message):
        optimizers.reason(training, optimizers.optimizer_config(training, None, "cpu"), strategy)


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
def runs(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]
) -> dict[str, tuple[FinishedRun, FinishedRun]]:
    """Returns, for each variant, a run of two epochs, and one that resumes from a run that was
    killed in the middle of the second epoch."""
    root = tmp_path_factory.mktemp("optimizers")

    def job(name: str, folder: str, resume: Path | None = None) -> Job:
        way = {**_WAYS[name], "training": {"max_steps": 6, "keep_best": False, **_WAYS[name].get("training", {})}}
        return prepare(root / name / folder, models["llama"], pairs(21), every=2, resume=resume, **way)

    def checkpoint_of_killed_run(name: str) -> Path:
        killed = job(name, "killed")
        assert killed.start(kill_point=KillPoint("/step-6")).wait_for_crash().codes == (-9,)
        checkpoint = newest_complete(killed.paths.checkpoints)
        assert checkpoint == killed.paths.checkpoints / "step-4"
        return checkpoint

    checkpoints = dict(
        zip(_WAYS, in_parallel([partial(checkpoint_of_killed_run, name) for name in _WAYS]), strict=True)
    )
    uninterrupted = finish_each({name: job(name, "whole") for name in _WAYS})
    resumed = finish_each({name: job(name, "resumed", checkpoints[name]) for name in _WAYS})
    return {name: (uninterrupted[name], resumed[name]) for name in _WAYS}


@pytest.mark.parametrize("way", _WAYS)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    way: str, runs: dict[str, tuple[FinishedRun, FinishedRun]]
) -> None:
    uninterrupted, resumed = runs[way]
    assert resumed.losses == uninterrupted.losses[4:]
    assert len(resumed.losses) == 2
    for name in ("weights.safetensors", "optimizer.safetensors"):
        expected, restored = (run.paths.checkpoints / "step-6" / name for run in (uninterrupted, resumed))
        assert expected.read_bytes() == restored.read_bytes()


def test_choices_of_the_recipe_are_reported_with_their_reasons(
    runs: dict[str, tuple[FinishedRun, FinishedRun]],
) -> None:
    assert runs["adamw_8bit"][0].decision("optimizer").choice == "adamw_8bit"
    assert "8 times as fast" in runs["adafactor, LoRA+"][0].decision("optimizer").reason
    order = runs["by length, padded"][0].decision("order")
    assert order.choice == "by length"
    assert "in random order" in order.reason
    (plan,) = runs["by length, padded"][0].events(events.PlanEvent)
    assert f"{plan.padding_share:.1%} of the computed tokens are padding" in order.reason
