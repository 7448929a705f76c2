"""What is chosen from an estimate of memory, with numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_api.resource import LoraSpec
from finetune_trainer import adapters, freezing, model, model_size, scale
from finetune_trainer.footprint import Footprint, Setting, Way, bytes_per_token, footprint
from finetune_trainer.model_size import ModelSize
from finetune_trainer.scale import Asked, Room

_GIB = 2**30
# Llama-3.1-8B with LoRA r=16 on q and v, and all of it trained.
_LORA = ModelSize(8_037_000_000, 6_815_744, 1_050_939_392, 32, 4096, 14336, 128256)
_FULL = replace(_LORA, trained=_LORA.parameters)
_SMALL = ModelSize(135_436_608, 921_600, 28_311_552, 30, 576, 1536, 49152)


def _setting(ranks: int, full: bool = False, optimizer: str = "adamw", half: bool = True) -> Setting:
    return Setting(ranks, optimizer, 2 if half and not full else 4, half, full)


def _asked(**changes: Any) -> Asked:
    return replace(Asked("auto", "none", "auto", 2048), **changes)


def _gpu(gib: int, host: int = 2000) -> Room:
    return Room("cuda", gib * _GIB, host * _GIB)


@pytest.mark.parametrize(
    ("size", "setting", "room", "chosen"),
    [
        pytest.param(_LORA, _setting(8), _gpu(80), "ddp", id="an adapter of 8B fits 80 GiB as it is"),
        pytest.param(
            _LORA, _setting(8), _gpu(24), "ddp, activations recomputed", id="with 24 GiB activations are recomputed"
        ),
        pytest.param(_LORA, _setting(8), _gpu(12), "fsdp, activations recomputed", id="with 12 GiB weights are split"),
        pytest.param(_FULL, _setting(8, full=True), _gpu(80), "fsdp", id="all of 8B is split over eight"),
        pytest.param(
            _FULL, _setting(2, full=True), _gpu(80), "zero2, optimizer offloaded, activations recomputed",
            id="over two its moments rest with the host",
        ),
        pytest.param(
            _FULL, _setting(1, full=True), _gpu(40), "zero3, parameters offloaded, activations recomputed",
            id="on one small GPU its weights do too",
        ),
        pytest.param(_SMALL, _setting(2, half=False), Room("cpu", 8 * _GIB, 8 * _GIB), "ddp", id="a small one on CPUs"),
        pytest.param(
            replace(_SMALL, trained=_SMALL.parameters), _setting(4, full=True, half=False),
            Room("cpu", int(2.5 * _GIB), _GIB), "zero2, activations recomputed",
            id="a small one, all trained, on narrow CPUs",
        ),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest_way_that_fits(size: ModelSize, setting: Setting, room: Room, chosen: str) -> None:
    found = scale.choose(_asked(), size, setting, room)
    assert str(found.way) == chosen
    assert scale.fits(found.footprint, found.tokens, room)
    assert ("nothing is faster" in found.reason) == (chosen == "ddp")


def test_the_hosts_memory_counts_where_things_rest_there() -> None:
    with pytest.raises(scale.TooLittleMemory, match="4 processes of this size with strategy fsdp would do"):
        scale.choose(_asked(), _FULL, _setting(2, full=True), _gpu(80, host=8))


def test_what_fits_nowhere_is_told_with_figures_and_a_remedy() -> None:
    with pytest.raises(scale.TooLittleMemory) as caught:
        scale.choose(_asked(), _FULL, _setting(1, full=True), Room("cpu", 16 * _GIB, 16 * _GIB))
    told = str(caught.value)
    for part in ("weights 44.91 GiB", "gradients 29.94 GiB", "optimizer 59.88 GiB", "16.00 GiB free", "method lora"):
        assert part in told


def test_a_named_strategy_is_tried_unless_its_weights_alone_are_too_much() -> None:
    named = _asked(strategy="ddp", recompute="never")
    found = scale.choose(named, _LORA, _setting(8), _gpu(17))
    assert (str(found.way), found.tokens, found.reason) == ("ddp", 2048, "distribution.strategy says so")
    with pytest.raises(scale.TooLittleMemory):
        scale.choose(named, _LORA, _setting(8), _gpu(12))


def test_auto_moves_at_least_what_is_asked_to_the_host() -> None:
    found = scale.choose(_asked(offload="optimizer"), _LORA, _setting(8), _gpu(80))
    assert str(found.way) == "zero2, optimizer offloaded"
    found = scale.choose(_asked(offload="parameters"), _LORA, _setting(8), _gpu(80))
    assert str(found.way) == "zero3, parameters offloaded"


def test_another_optimizer_than_adamw_is_never_split_by_auto() -> None:
    ways = scale.candidates(_asked(), _setting(8, optimizer="muon"), _gpu(80))
    assert {way.strategy for way in ways} == {"ddp"}


@pytest.mark.parametrize(
    ("room", "longest", "tokens"),
    [
        pytest.param(Room("cpu", 64 * _GIB, 64 * _GIB), 128, 768, id="a cpu has enough with some hundred tokens"),
        pytest.param(Room("cpu", 64 * _GIB, 64 * _GIB), 2048, 2048, id="at least the longest row"),
        pytest.param(_gpu(80), 2048, 16384, id="a gpu takes more"),
    ],
)
def test_a_micro_batch_is_what_helps_and_fits(room: Room, longest: int, tokens: int) -> None:
    found = scale.choose(_asked(longest=longest), _SMALL, _setting(1, half=False), room)
    assert found.tokens == tokens
    assert f"{longest} tokens" in found.tokens_reason


def test_a_micro_batch_that_the_user_names_is_taken_and_counts() -> None:
    found = scale.choose(_asked(tokens=32768), _LORA, _setting(8), _gpu(80))
    assert (found.tokens, found.tokens_reason) == (32768, "training.microBatchSize says so")
    assert found.way.recompute


def test_parts_add_up_by_hand() -> None:
    """ZeRO-2 in float32 over two ranks: weights whole; gradients, moments and DeepSpeed's own copy in halves."""
    size = replace(_SMALL, trained=_SMALL.parameters)
    needs = footprint(size, _setting(2, full=True, half=False), Way("zero2"))
    count = size.parameters
    assert needs.weights == 4 * count
    assert needs.gradients == 4 * count // 2
    assert needs.optimizer == (8 + 4) * count // 2
    assert needs.total(100) - needs.total(0) == 100 * needs.token
    assert needs.table(100).count("GiB") == 6
    split = footprint(size, _setting(2, full=True, half=False), Way("fsdp"))
    assert split.weights == 4 * count // 2 + 2 * 4 * size.largest
    away = footprint(size, _setting(2, full=True, half=False), Way("zero2", "optimizer"))
    assert away.optimizer == 0
    assert isinstance(away, Footprint)


def test_recomputing_keeps_a_layers_input_alone() -> None:
    setting = _setting(1, half=False)
    assert bytes_per_token(_SMALL, setting, recompute=True) < bytes_per_token(_SMALL, setting, recompute=False) / 8


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "t5"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_a_models_size_is_read_without_loading_it(family: str, full: bool, models: dict[str, Path]) -> None:
    import torch

    targets = {"gpt2": ("c_attn",), "t5": ("q", "v")}.get(family, ("q_proj", "v_proj"))
    lora = LoraSpec(rank=4, alpha=8, target_modules=targets)
    loaded = model.load(models[family], dtype=torch.float32, longest=16)
    loaded = freezing.unfreeze(loaded) if full else adapters.adapt(loaded, lora, 1)
    read = model_size.read(models[family], None if full else lora)
    assert (read.parameters, read.trained) == (loaded.parameters, loaded.trainable)
    assert (read.layers, read.hidden, read.vocabulary) == (4 if family == "t5" else 2, 32, 300)


def test_all_linear_adapts_the_layers_only(models: dict[str, Path]) -> None:
    import torch

    lora = LoraSpec(rank=4, alpha=8, target_modules=("all-linear",))
    loaded = adapters.adapt(model.load(models["qwen2"], dtype=torch.float32, longest=16), lora, 1)
    assert model_size.read(models["qwen2"], lora).trained == loaded.trainable
