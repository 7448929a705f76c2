"""The strategy that is chosen from an estimate of memory, with numbers that can be checked by
hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from finetune_api.resource import LoraSpec
from finetune_trainer.model import freezing, loading
from finetune_trainer.model import lora as adapters
from finetune_trainer.parallel import free_memory, model_size, strategy_choice
from finetune_trainer.parallel.estimate import activations
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING, NOTHING
from finetune_trainer.parallel.free_memory import FreeMemory, TooLittleMemory
from finetune_trainer.parallel.memory_estimate import (
    MemoryEstimate,
    ParallelConfig,
    TrainingSetup,
    memory_estimate,
)
from finetune_trainer.parallel.model_size import ModelSize
from finetune_trainer.parallel.strategy_choice import UserChoice
from sizing.fits import METHODS, run_config

_GIB = 2**30
# Llama-3.1-8B with LoRA (rank 16 on q and v), and with full training.
_LORA = ModelSize(8_037_000_000, 6_815_744, 1_050_939_392, 32, 4096, 14336, 128256)
_FULL = replace(_LORA, trained=_LORA.parameters)
_SMALL = ModelSize(135_436_608, 921_600, 28_311_552, 30, 576, 1536, 49152)


def _setup(ranks: int, full: bool = False, optimizer: str = "adamw", half: bool = True) -> TrainingSetup:
    """Returns a setup on GPUs, or on CPUs if it isn't `half`."""
    device: Literal["cpu", "cuda"] = "cuda" if half else "cpu"
    return TrainingSetup(ranks, optimizer, 2 if half and not full else 4, half, full, device=device)


def _user_choice(**changes: Any) -> UserChoice:
    return replace(UserChoice("auto", "none", "auto", 2048), **changes)


def _gpu(gib: int, host: int = 2000) -> FreeMemory:
    return FreeMemory("cuda", gib * _GIB, host * _GIB)


@pytest.mark.parametrize(
    ("size", "setup", "memory", "expected"),
    [
        pytest.param(_LORA, _setup(8), _gpu(80), "ddp", id="an adapter of 8B fits 80 GiB as it is"),
        pytest.param(
            _LORA, _setup(8), _gpu(24), "ddp, activations recomputed except attention",
            id="with 24 GiB activations are recomputed",
        ),
        pytest.param(_LORA, _setup(8), _gpu(12), "fsdp, activations recomputed", id="with 12 GiB weights are sharded"),
        pytest.param(_FULL, _setup(8, full=True), _gpu(80), "fsdp", id="all of 8B is sharded over eight"),
        pytest.param(
            _FULL, _setup(2, full=True), _gpu(80),
            "zero3, optimizer offloaded, activations recomputed",
            id="over two its moments are offloaded to the host",
        ),
        pytest.param(
            _FULL, _setup(1, full=True), _gpu(40), "zero3, parameters offloaded, activations recomputed",
            id="on one small GPU its weights are offloaded too",
        ),
        pytest.param(
            _SMALL, _setup(2, half=False), FreeMemory("cpu", 8 * _GIB, 8 * _GIB), "ddp", id="a small model on CPUs"
        ),
        pytest.param(
            replace(_SMALL, trained=_SMALL.parameters), _setup(4, full=True, half=False),
            FreeMemory("cpu", int(2.5 * _GIB), int(2.5 * _GIB)), "zero2, activations recomputed",
            id="a small model, all trained, on CPUs with little memory",
        ),
    ],
)  # fmt: skip
def test_auto_chooses_the_fastest_configuration_that_fits(
    size: ModelSize, setup: TrainingSetup, memory: FreeMemory, expected: str
) -> None:
    choice = strategy_choice.choose(_user_choice(), size, setup, memory)
    assert str(choice.parallel) == expected
    assert free_memory.fits(choice.estimate, choice.tokens, memory)
    assert ("nothing is faster" in choice.reason) == (expected == "ddp")


def test_the_hosts_memory_is_a_limit_if_something_is_offloaded() -> None:
    with pytest.raises(TooLittleMemory, match="4 processes of this size with strategy fsdp would do") as error:
        strategy_choice.choose(_user_choice(), _FULL, _setup(2, full=True), _gpu(80, host=30))
    assert error.value.field == "resources.memory"


def test_a_model_that_doesnt_fit_is_reported_with_figures_and_a_remedy() -> None:
    with pytest.raises(TooLittleMemory) as error:
        strategy_choice.choose(_user_choice(), _FULL, _setup(1, full=True), FreeMemory("cpu", 16 * _GIB, 16 * _GIB))
    message = str(error.value)
    for part in ("weights 44.91 GiB", "gradients 29.94 GiB", "optimizer 59.88 GiB", "16.00 GiB free", "method lora"):
        assert part in message


def test_the_users_strategy_is_tried_unless_its_weights_alone_are_too_large() -> None:
    named = _user_choice(strategy="ddp", recompute="never")
    choice = strategy_choice.choose(named, _LORA, _setup(8), _gpu(17))
    assert (str(choice.parallel), choice.tokens, choice.reason) == ("ddp", 2048, "set by distribution.strategy")
    with pytest.raises(TooLittleMemory):
        strategy_choice.choose(named, _LORA, _setup(8), _gpu(12))


def test_auto_offloads_at_least_what_the_user_sets() -> None:
    choice = strategy_choice.choose(_user_choice(offload="optimizer"), _LORA, _setup(8), _gpu(80))
    assert str(choice.parallel) == "zero2, optimizer offloaded"
    choice = strategy_choice.choose(_user_choice(offload="parameters"), _LORA, _setup(8), _gpu(80))
    assert str(choice.parallel) == "zero3, parameters offloaded"


def test_auto_never_shards_another_optimizer_than_adamw() -> None:
    configs = strategy_choice.candidates(_user_choice(), _setup(8, optimizer="muon"), _gpu(80))
    assert {config.strategy for config in configs} == {"ddp"}


@pytest.mark.parametrize(
    ("memory", "longest", "tokens"),
    [
        pytest.param(FreeMemory("cpu", 64 * _GIB, 64 * _GIB), 128, 768, id="a few hundred tokens are enough for a CPU"),
        pytest.param(FreeMemory("cpu", 64 * _GIB, 64 * _GIB), 2048, 2048, id="at least the longest row"),
        pytest.param(_gpu(80), 2048, 16384, id="a GPU uses more"),
    ],
)
def test_a_micro_batch_has_a_useful_size_that_fits(memory: FreeMemory, longest: int, tokens: int) -> None:
    choice = strategy_choice.choose(_user_choice(longest=longest), _SMALL, _setup(1, half=False), memory)
    assert choice.tokens == tokens
    assert f"{longest} tokens" in choice.tokens_reason


def test_the_users_micro_batch_is_used_and_counts_in_the_estimate() -> None:
    choice = strategy_choice.choose(_user_choice(tokens=32768), _LORA, _setup(8), _gpu(80))
    assert (choice.tokens, choice.tokens_reason) == (32768, "set by training.microBatchSize")
    assert choice.parallel.recompute


def test_parts_add_up_by_hand() -> None:
    """ZeRO-2 in float32 on two ranks: the weights are complete; the gradients, moments and
    DeepSpeed's own copy are halved, but the gradient of the tensor at the border is whole."""
    size = replace(_SMALL, trained=_SMALL.parameters)
    estimate = memory_estimate(size, _setup(2, full=True, half=False), ParallelConfig("zero2"))
    count = size.parameters
    assert estimate.weights == 4 * count
    assert estimate.gradients == 4 * count // 2 + 4 * size.largest
    assert estimate.optimizer == (8 + 4) * count // 2
    assert estimate.total(10**6) - estimate.total(10**6 - 100) == 100 * estimate.per_token
    assert estimate.table(100).count("GiB") == 5
    sharded = memory_estimate(size, _setup(2, full=True, half=False), ParallelConfig("fsdp"))
    assert sharded.weights == 4 * count // 2 + 3 * 4 * size.largest
    offloaded = memory_estimate(size, _setup(2, full=True, half=False), ParallelConfig("zero2", "optimizer"))
    assert offloaded.optimizer == 0
    assert isinstance(offloaded, MemoryEstimate)


def test_recomputation_stores_only_a_layers_input() -> None:
    precision = activations.Precision(half=False, trained=False)
    again, stored = (
        activations.bytes_per_token(_SMALL, precision, recompute=recompute) for recompute in (EVERYTHING, NOTHING)
    )
    assert again.stored + again.outside < stored.stored / 8


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "t5"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_a_models_size_is_read_without_loading_it(family: str, full: bool, models: dict[str, Path]) -> None:
    import torch

    targets = {"gpt2": ("c_attn",), "t5": ("q", "v")}.get(family, ("q_proj", "v_proj"))
    lora = LoraSpec(rank=4, alpha=8, target_modules=targets)
    loaded = loading.load(models[family], dtype=torch.float32, longest=16)
    loaded = freezing.unfreeze(loaded) if full else adapters.adapt(loaded, lora, 1)
    read = model_size.read(models[family], None if full else lora)
    assert (read.parameters, read.trained) == (loaded.parameters, loaded.trainable)
    assert (read.layers, read.hidden, read.vocabulary) == (4 if family == "t5" else 2, 32, 300)


def test_all_linear_adapts_the_layers_only(models: dict[str, Path]) -> None:
    import torch

    lora = LoraSpec(rank=4, alpha=8, target_modules=("all-linear",))
    loaded = adapters.adapt(loading.load(models["qwen2"], dtype=torch.float32, longest=16), lora, 1)
    assert model_size.read(models["qwen2"], lora).trained == loaded.trainable


@pytest.mark.parametrize(
    ("keys", "shares_prefixes", "layer"),
    [
        # dq, its sum in float32 and the output's gradient; dk and dv
        (4096, False, 8 * 4096 + 4 * 4096),
        # twice as many keys, values and gradients of both, gathered; and the sums in float32
        (4096, True, 8 * 4096 + 2 * 8 * 4096 + 8 * 4096),
        # a copy of dk and dv for each of the queries that share a key
        (1024, True, 8 * 4096 + 2 * (8 * 1024 + 4 * 4096) + 8 * 1024),
    ],
)
def test_the_gathered_keys_of_shared_prefixes_are_counted(keys: int, shares_prefixes: bool, layer: int) -> None:
    """One layer at a time, since they are gathered again in the backward pass."""
    shape = model_size.LayerShape(4096, keys, 2 * 4096)
    size = replace(_LORA, intermediate=1024, layer=shape)
    precision = activations.Precision(half=True, trained=False)
    token = activations.bytes_per_token(size, precision, recompute=NOTHING, shares_prefixes=shares_prefixes)
    assert token.layer == layer
    setup = replace(_setup(1), shares_prefixes=shares_prefixes)
    assert memory_estimate(size, setup, ParallelConfig("ddp")).token == token


@pytest.mark.parametrize(
    ("config", "chunks"),
    [
        ({"head_dim": 128}, False),
        ({"hidden_size": 4096, "num_attention_heads": 32}, False),
        ({"head_dim": 128, "attn_logit_softcapping": 50.0}, True),
        ({"head_dim": 100}, True),
        ({"head_dim": 320}, True),
    ],
)
def test_scores_of_attention_without_a_kernel_are_counted(config: dict[str, Any], chunks: bool) -> None:
    size = model_size.size_of(config, {}, None)
    assert size.chunks_scores == chunks
    setup = _setup(1)
    plain, counted = (
        memory_estimate(replace(_LORA, chunks_scores=flag), setup, ParallelConfig("ddp")).buffers
        for flag in (False, True)
    )
    assert counted - plain == 5 * 4 * 2**24


def test_a_run_that_shares_no_prefixes_gathers_no_keys() -> None:
    run = run_config(METHODS[0], 1)
    setups = {}
    for packing, shared in itertools.product((True, False), ("auto", "off")):
        data = run.data.model_copy(update={"packing": packing, "shared_prefix": shared})
        setup = strategy_choice.training_setup(run.model_copy(update={"data": data}), half=True)
        setups[packing, shared] = setup.shares_prefixes
    assert setups == {(True, "auto"): True, (True, "off"): False, (False, "auto"): False, (False, "off"): False}
