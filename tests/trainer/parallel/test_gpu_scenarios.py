"""What auto chooses for well-known models on common GPUs, and which memory an error names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from finetune_api.resource import LoraSpec
from finetune_api.spec.hardware import Strategy
from finetune_trainer.errors import RunError
from finetune_trainer.parallel import model_size, strategy_choice
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING
from finetune_trainer.parallel.estimate.speed_estimate import seconds_per_token
from finetune_trainer.parallel.free_memory import FreeMemory, TooLittleMemory, host_memory
from finetune_trainer.parallel.memory_estimate import ParallelConfig, TrainingSetup, memory_estimate
from finetune_trainer.parallel.model_size import ModelSize
from finetune_trainer.parallel.strategy_choice import Choice, UserChoice
from finetune_trainer.training.resolve import Facts, resolve
from sizing.fits import METHODS, run_config
from sizing.models import MODELS, tensor_shapes

_GIB = 2**30
_MODELS = {model.name: model for model in MODELS}
_LORA = LoraSpec(rank=16, target_modules=("all-linear",), dropout=0.05)


@dataclass(frozen=True)
class Scenario:
    """Describes a run. `free` and `host` are the GiB that each process has of its GPU and of the
    host."""

    model: str
    method: Literal["lora", "qlora", "full"]
    ranks: int
    free: float
    host: float
    longest: int = 2048
    nodes: int = 1
    strategy: Any = "auto"
    parts: int = 1

    @property
    def size(self) -> ModelSize:
        model = _MODELS[self.model]
        lora = None if self.method == "full" else _LORA
        return model_size.size_of(model.config, tensor_shapes(model), lora)

    @property
    def setup(self) -> TrainingSetup:
        full = self.method == "full"
        quantized = "nf4" if self.method == "qlora" else "none"
        return TrainingSetup(
            self.ranks, "adamw", 4 if full else 2, True, full, quantized, nodes=self.nodes, parts=self.parts
        )

    def choose(self) -> Choice:
        memory = FreeMemory("cuda", int(self.free * _GIB), int(self.host * _GIB))
        user_choice = UserChoice(self.strategy, "none", "auto", self.longest, parts=self.parts)
        return strategy_choice.choose(user_choice, self.size, self.setup, memory)


_LORA_8B_4090 = Scenario("Llama-3.1-8B", "lora", 1, 23.2, 60)
_LORA_8B_H100 = Scenario("Llama-3.1-8B", "lora", 8, 78.5, 120)
_FULL_8B_H100 = Scenario("Llama-3.1-8B", "full", 8, 78.5, 120)
_QLORA_8B_A10G = Scenario("Llama-3.1-8B", "qlora", 4, 21.9, 40)
_QLORA_70B_L40S = Scenario("Llama-3.1-70B", "qlora", 8, 44.4, 60)
_FULL_70B = Scenario("Llama-3.1-70B", "full", 32, 78.5, 200, nodes=4)

_CHOICES = [
    pytest.param(_LORA_8B_4090, "ddp, activations recomputed except attention", id="LoRA 8B on a 4090"),
    pytest.param(
        replace(_LORA_8B_4090, longest=7168), "ddp, activations recomputed", id="LoRA 8B on a 4090, rows of 7,168"
    ),
    pytest.param(replace(_LORA_8B_4090, free=21.9), "ddp, activations recomputed", id="LoRA 8B on an A10G"),
    pytest.param(_QLORA_8B_A10G, "fsdp", id="QLoRA 8B on four A10G"),
    pytest.param(
        replace(_QLORA_8B_A10G, longest=16384), "fsdp, activations recomputed except attention",
        id="QLoRA 8B on A10G, rows of 16,384",
    ),
    pytest.param(_LORA_8B_H100, "ddp", id="LoRA 8B on eight H100"),
    pytest.param(replace(_LORA_8B_H100, host=14), "fsdp", id="LoRA 8B on eight H100 with too little host memory"),
    pytest.param(
        replace(_LORA_8B_H100, longest=32768), "ddp, activations recomputed except attention",
        id="LoRA 8B on H100, rows of 32,768",
    ),
    pytest.param(_FULL_8B_H100, "fsdp", id="full 8B on eight H100"),
    pytest.param(Scenario("Llama-3.2-3B", "full", 8, 78.5, 60), "fsdp", id="full 3B on eight H100"),
    pytest.param(
        Scenario("Llama-3.1-70B", "qlora", 8, 78.5, 200), "fsdp, activations of 25% of the layers recomputed",
        id="QLoRA 70B on eight H100",
    ),
    pytest.param(
        _QLORA_70B_L40S, "fsdp, activations of 75% of the layers recomputed", id="QLoRA 70B on eight L40S"
    ),
    pytest.param(
        replace(_QLORA_70B_L40S, ranks=2, free=23.2, host=60),
        "fsdp, parameters offloaded, activations recomputed",
        id="QLoRA 70B on two 4090",
    ),
    pytest.param(
        Scenario("Llama-3.1-70B", "lora", 8, 78.5, 200), "fsdp, activations recomputed", id="LoRA 70B on eight H100"
    ),
    pytest.param(replace(_LORA_8B_H100, ranks=32, nodes=4), "ddp", id="LoRA 8B on 4 x 8 H100"),
    pytest.param(
        replace(_FULL_8B_H100, ranks=32, nodes=4), "fsdp within each of 4 nodes", id="full 8B on 4 x 8 H100"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scenario", "expected"), _CHOICES)
def test_auto_chooses(scenario: Scenario, expected: str) -> None:
    choice = scenario.choose()
    assert str(choice.parallel) == expected
    assert choice.tokens >= scenario.longest


@pytest.mark.parametrize("scenario", [*(param.values[0] for param in _CHOICES), _FULL_70B], ids=str)
def test_more_host_memory_never_leads_to_a_slower_choice(scenario: Scenario) -> None:
    previous: tuple[bool, float] | None = None
    for host in (1, 2, 4, 8, 14, 16, 30, 60, 120, 200, 500, 1000):
        try:
            choice = replace(scenario, host=host).choose()
        except TooLittleMemory:
            assert previous is None
            continue
        seconds = seconds_per_token(scenario.size, scenario.setup, choice.parallel, choice.tokens)
        preference = choice.parallel.offload != "none", seconds
        assert previous is None or preference <= previous
        previous = preference


@pytest.mark.parametrize(("ranks", "share"), [(2, 1 / 2), (4, 1 / 4), (8, 1 / 8)])
def test_each_rank_of_a_sharded_quantized_base_holds_its_share_of_the_packed_weights(ranks: int, share: float) -> None:
    """The constants, about a byte for 64 values, and what is gathered at a time are complete."""
    scenario = replace(_QLORA_70B_L40S, ranks=ranks)
    sharded, offloaded, replicated = (
        memory_estimate(scenario.size, scenario.setup, config).weights
        for config in (ParallelConfig("fsdp"), ParallelConfig("fsdp", "parameters"), ParallelConfig("ddp"))
    )
    assert sharded - offloaded == pytest.approx((replicated - 1.4e9) * share, rel=0.02)
    assert offloaded < 7 * _GIB


@pytest.mark.parametrize("quantized", ["int8", "nf4"])
def test_only_ddp_and_with_nf4_fsdp_can_hold_a_quantized_base(quantized: Any) -> None:
    setup = replace(_QLORA_70B_L40S.setup, quantized=quantized)
    strategies: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp")
    expected = ["ddp", "fsdp"] if quantized == "nf4" else ["ddp"]
    assert [strategy for strategy in strategies if setup.supports(strategy)] == expected
    assert not replace(setup, reads_base=True).supports("fsdp")


def test_a_choice_that_host_memory_prevents_is_explained() -> None:
    reason = replace(_LORA_8B_H100, host=14).choose().reason
    for part in ("of host memory in a pod to load the model", "112.00 GiB are free", "raise resources.memory"):
        assert part in reason


@pytest.mark.parametrize(
    ("scenario", "parts"),
    [
        pytest.param(
            replace(_LORA_8B_4090, host=14),
            ("needs 15.11 GiB of host memory in a pod to load the model", "14.00 GiB are free", "by at least 2Gi"),
            id="loading on one GPU",
        ),
        pytest.param(
            replace(_FULL_8B_H100, host=8, strategy="fsdp"),
            ("to train and to copy checkpoints", "64.00 GiB are free", "by at least 26Gi"),
            id="copies for checkpoints",
        ),
        pytest.param(
            Scenario("Llama-3.1-8B", "full", 32, 78.5, 3.5, nodes=4, strategy="zero2"),
            ("to load the model", "28.00 GiB are free"),
            id="loading in float32 by each rank",
        ),
    ],
)
def test_an_error_about_the_host_names_its_memory(scenario: Scenario, parts: tuple[str, ...]) -> None:
    with pytest.raises(TooLittleMemory) as error:
        scenario.choose()
    assert error.value.field == "resources.memory"
    for part in parts:
        assert part in str(error.value)
    assert "GPU memory" not in str(error.value)


@pytest.mark.parametrize(
    ("scenario", "parts"),
    [
        pytest.param(_LORA_8B_H100, 4, id="LoRA"),
        pytest.param(_FULL_8B_H100, 4, id="full"),
        pytest.param(replace(_LORA_8B_H100, longest=786432), 8, id="LoRA, rows of 786,432"),
    ],
)
def test_an_error_about_a_long_row_names_how_many_processes_would_have_to_share_it(
    scenario: Scenario, parts: int
) -> None:
    scenario = replace(scenario, longest=max(scenario.longest, 262144))
    with pytest.raises(TooLittleMemory) as error:
        scenario.choose()
    assert f"With distribution.sequenceParallelSize {parts}, as many processes share each row" in str(error.value)
    choice = replace(scenario, parts=parts).choose()
    assert scenario.longest // parts <= choice.tokens < scenario.longest
    assert f"{scenario.longest} tokens, divided among {parts} processes" in choice.tokens_reason
    with pytest.raises(TooLittleMemory):
        replace(scenario, parts=parts // 2).choose()


def test_an_error_names_what_must_be_offloaded_if_processes_share_rows() -> None:
    scenario = Scenario("Qwen2.5-0.5B", "full", 2, 4.5, 60, longest=8192)
    with pytest.raises(TooLittleMemory, match="strategy zero3 with offload parameters would do"):
        scenario.choose()
    memory = FreeMemory("cuda", int(4.5 * _GIB), 60 * _GIB)
    shared = replace(scenario, parts=2)
    user_choice = UserChoice("zero3", "parameters", "auto", 8192, parts=2)
    assert strategy_choice.choose(user_choice, shared.size, shared.setup, memory).parallel.offload == "parameters"


def test_an_error_names_no_number_of_processes_that_cannot_share_a_row() -> None:
    """28 attention heads can be divided among 7 processes, but not among 8."""
    heads = replace(_LORA_8B_H100.size, heads=28)
    scenario = replace(_LORA_8B_H100, longest=786432)
    with pytest.raises(TooLittleMemory) as error:
        strategy_choice.choose(
            UserChoice("auto", "none", "auto", scenario.longest), heads, scenario.setup,
            FreeMemory("cuda", int(78.5 * _GIB), 120 * _GIB),
        )  # fmt: skip
    assert "sequenceParallelSize" not in str(error.value)


def test_exchanging_heads_takes_time_and_more_of_it_between_nodes() -> None:
    scenario = replace(_LORA_8B_H100, ranks=16, nodes=2, longest=65536)
    config = ParallelConfig("ddp", recompute=EVERYTHING)
    seconds = [
        seconds_per_token(scenario.size, replace(scenario.setup, parts=parts), config, 8192, scenario.longest)
        for parts in (1, 2, 8, 16)
    ]
    assert sorted(seconds) == seconds
    assert seconds[2] < 1.1 * seconds[0]
    assert seconds[3] > 1.1 * seconds[0]


def test_an_error_about_the_gpu_names_its_memory() -> None:
    with pytest.raises(TooLittleMemory) as error:
        replace(_LORA_8B_4090, free=8, longest=65536).choose()
    assert error.value.field == "distribution.strategy"
    assert "of GPU memory in total for each of 1 processes, but only 6.80 GiB of 8.00 GiB free" in str(error.value)
    assert "host" not in str(error.value)


def test_a_run_that_lacks_host_memory_ends_before_it_loads_anything() -> None:
    memory = FreeMemory("cuda", int(23.2 * _GIB), 14 * _GIB)
    facts = Facts(("bfloat16", "set by model.dtype"), 2048, _LORA_8B_4090.size, memory, 0, None)
    with pytest.raises(RunError, match=r"^InvalidConfig: resources\.memory: the GPUs suffice") as error:
        resolve(run_config(METHODS[0], 1), facts)
    assert error.value.reason == "InvalidConfig"


def test_a_full_model_in_shards_needs_the_host_only_for_copies_of_checkpoints() -> None:
    """Its files are mapped, in bfloat16, and its result is gathered weight by weight."""
    size = replace(_FULL_70B.size, formats=frozenset({"BF16"}))
    host = memory_estimate(size, _FULL_70B.setup, ParallelConfig("fsdp", recompute=EVERYTHING)).host
    assert host.loading == 0
    assert host.saving < 14 * _GIB
    assert host.training == size.trained * 12 * 8 // 32
    unmapped = memory_estimate(_FULL_70B.size, _FULL_70B.setup, ParallelConfig("fsdp", recompute=EVERYTHING)).host
    assert unmapped.loading == size.parameters * 4


def test_a_cpu_run_that_lacks_the_hosts_memory_for_its_checkpoints_ends_with_the_field_and_the_amount() -> None:
    scenario = Scenario("Llama-3.2-3B", "full", 1, 0, 0)
    setup = replace(scenario.setup, stored=4, half=False, device="cpu")
    enough = FreeMemory("cpu", 160 * _GIB, 160 * _GIB)
    user_choice = UserChoice("ddp", "none", "always", 128)
    choice = strategy_choice.choose(user_choice, scenario.size, setup, enough)
    need = host_memory(choice.estimate, 128, "cpu")
    assert need.peak == choice.estimate.total(128) + 12 * scenario.size.trained
    lacking = FreeMemory("cpu", need.peak - _GIB, need.peak - _GIB)
    assert choice.estimate.total(128) < lacking.usable
    with pytest.raises(TooLittleMemory, match="to train and to copy checkpoints") as error:
        strategy_choice.choose(user_choice, scenario.size, setup, lacking)
    assert error.value.field == "resources.memory"
    assert "Raise resources.memory by at least 1Gi" in str(error.value)
