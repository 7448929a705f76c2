"""LoRA on a mixture of experts says what it leaves unchanged, never touches a router that isn't
named, resumes to the bit, and its result loads on the original base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune_api.messages import events
from finetune_api.resource import LoraSpec
from finetune_trainer.errors import RunError
from finetune_trainer.model import experts, loading
from finetune_trainer.model import lora as adapters
from finetune_trainer.model.quantization import Quantization
from finetune_trainer.parallel import model_size
from finetune_trainer.parallel.memory_estimate import ParallelConfig, TrainingSetup, memory_estimate
from testkit import tiny_models
from testkit.rows import pairs
from trainer.support import result_loading
from trainer.support.rank_runs import FinishedRun, Job, finish_each, prepare

_ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
_SHARED_EXPERT = ["down_proj", "gate_proj", "up_proj"]
_FAMILIES: dict[str, tuple[Callable[..., Path], list[str], list[str]]] = {
    "mixtral": (tiny_models.tiny_mixtral, _ATTENTION, ["down_proj", "gate_up_proj"]),
    "qwen2-moe": (tiny_models.tiny_qwen2_moe, sorted(_ATTENTION + _SHARED_EXPERT), ["down_proj", "gate_up_proj"]),
    "qwen3-moe": (tiny_models.tiny_qwen3_moe, _ATTENTION, ["down_proj", "gate_up_proj"]),
    "gpt-oss": (tiny_models.tiny_gpt_oss, _ATTENTION, ["down_proj", "gate_up_proj"]),
}


@pytest.mark.parametrize("family", _FAMILIES)
def test_all_linear_adapts_no_expert_and_no_router_and_says_so(family: str, tmp_path: Path) -> None:
    build, adapted, parameters = _FAMILIES[family]
    folder = build(tmp_path / "base")
    loaded = loading.load(folder, dtype=torch.float32, longest=16)
    mixture = experts.find(loaded.base)
    assert list(mixture.parameters) == parameters
    assert mixture.routers == (("shared_expert_gate",) if family == "qwen2-moe" else ())
    lora = LoraSpec(rank=4, target_modules=("all-linear",))
    model = adapters.adapt(loaded, lora, 1).model
    assert adapters.adapted_layers(model) == adapted
    assert f"it adapts {', '.join(adapted)}; method.type full trains" in mixture.warning(adapted)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model_size.read(folder, lora).trained == trained


def test_a_router_that_is_named_is_adapted(tmp_path: Path) -> None:
    loaded = loading.load(tiny_models.tiny_qwen2_moe(tmp_path / "base"), dtype=torch.float32, longest=16)
    model = adapters.adapt(loaded, LoraSpec(rank=1, target_modules=("q_proj", "shared_expert_gate")), 1).model
    assert adapters.adapted_layers(model) == ["q_proj", "shared_expert_gate"]


@pytest.mark.parametrize("family", [*_FAMILIES, "llama"])
def test_the_estimate_of_a_quantized_base_counts_what_stays_unquantized(
    family: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    """bitsandbytes quantizes linear layers. Experts are none, however a file stores them."""
    folder = _FAMILIES[family][0](tmp_path / "base", hidden=128) if family in _FAMILIES else models[family]
    nf4 = Quantization("nf4", torch.device("cpu"))
    base = loading.load(folder, dtype=torch.bfloat16, longest=16, quantized=nf4).base
    stored = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    lora = LoraSpec(rank=1, target_modules=("q_proj",))
    size = model_size.read(folder, lora)
    setup = TrainingSetup(1, "adamw", 2, True, False, "nf4")
    estimated = memory_estimate(size, setup, ParallelConfig("ddp")).weights - 4 * size.trained
    assert estimated == pytest.approx(stored, rel=0.05)


def test_what_quantization_leaves_out_is_reported() -> None:
    mixture = experts.Experts(("down_proj", "gate_up_proj"), (), 9, 10)
    assert "model.quantization doesn't quantize them" in mixture.warning(["q_proj"], quantized=True)
    assert "quantization" not in mixture.warning(["q_proj"])


def test_a_layer_with_experts_is_gathered_with_them(tmp_path: Path) -> None:
    for build in (tiny_models.tiny_mixtral, tiny_models.tiny_gpt_oss):
        folder = build(tmp_path / build.__name__)
        layer = loading.layers(loading.load(folder, dtype=torch.float32, longest=16).base)[0]
        values = sum(parameter.numel() for parameter in layer.parameters())
        assert model_size.read(folder, None).layer_values == values


def test_a_dense_model_has_no_experts(models: dict[str, Path]) -> None:
    mixture = experts.find(loading.load(models["llama"], dtype=torch.float32, longest=16).base)
    assert (mixture.parameters, mixture.routers, mixture.weights) == ((), (), 0)


@pytest.mark.parametrize("target", ["up_proj", "gate"])
def test_a_name_that_peft_takes_for_the_experts_is_refused(target: str, tmp_path: Path) -> None:
    loaded = loading.load(tiny_models.tiny_qwen3_moe(tmp_path / "base"), dtype=torch.float32, longest=16)
    with pytest.raises(RunError, match=f"targetModules: {target} would adapt the experts, which isn't supported"):
        adapters.adapt(loaded, LoraSpec(rank=1, target_modules=("q_proj", target)), 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    root = tmp_path_factory.mktemp("experts")
    bases = {family: _FAMILIES[family][0](root / f"{family}-base") for family in ("mixtral", "qwen2-moe")}
    runs = finish_each({family: _job(root / family, base) for family, base in bases.items()})
    resumed = {
        family: _job(root / f"{family}-again", base, runs[family].paths.checkpoints / "step-2")
        for family, base in bases.items()
    }
    return {**runs, **{f"{family}, resumed": run for family, run in finish_each(resumed).items()}}


def _job(folder: Path, base: Path, resume: Path | None = None) -> Job:
    return prepare(
        folder, base, pairs(12), lora={"target_modules": ("all-linear",), "dropout": 0.1}, test=pairs(5, 1),
        training={"max_steps": 4}, every=2, resume=resume,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_a_run_reports_it_resumes_to_the_bit_and_its_result_loads(
    family: str, runs: dict[str, FinishedRun], tmp_path: Path
) -> None:
    run, resumed = runs[family], runs[f"{family}, resumed"]
    assert run.events(events.SavedEvent), run.events(events.ErrorEvent)
    assert "LoRA changes no weight of the experts (down_proj, gate_up_proj: " in run.decision("experts").reason
    assert resumed.losses == run.losses[2:]
    name = "adapter_model.safetensors"
    assert (run.paths.export / name).read_bytes() == (resumed.paths.export / name).read_bytes()
    losses = run.evals("test")
    assert result_loading.loss(result_loading.result(run), run, tmp_path) == pytest.approx(losses[4], abs=2e-5)
    if family == "qwen2-moe":
        assert run.decision("routers").choice == "not adapted"
        config = json.loads((run.paths.export / "adapter_config.json").read_text())
        assert sorted(config["target_modules"]) == sorted(_ATTENTION + _SHARED_EXPERT)
