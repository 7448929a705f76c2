"""Variants besides plain LoRA: each one trains, resumes to the bit, and its result loads with plain
PEFT on the original base, with the loss that the run reported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.messages import events
from finetune_api.resource import FullSpec, LoraSpec
from finetune_trainer.errors import RunError
from finetune_trainer.model import freezing, loading
from finetune_trainer.model import lora as adapters
from finetune_trainer.parallel import model_size
from testkit.rows import pairs
from trainer.support import result_loading
from trainer.support.rank_runs import CheckedRuns, FinishedRun, Job, finish_each, prepare

_HELD_OUT = pairs(5, 1)


@dataclass(frozen=True)
class Way:
    """A variant. `lora` and `full` are options of the method; the base is a tiny model of
    `family`."""

    lora: dict[str, Any]
    family: str = "llama"
    world: int = 1
    full: dict[str, Any] | None = None
    quantization: str = "none"
    dtype: str = "float32"

    @property
    def tolerance(self) -> float:
        """The tolerance for a loss that another implementation computes again in float32."""
        return 2e-5 if self.dtype == "float32" else 3e-2


WAYS: dict[str, Way] = {
    "plain": Way({"dropout": 0.1}),
    "all-linear": Way({"target_modules": ("all-linear",)}),
    "rsLoRA": Way({"rank_stabilized": True, "dropout": 0.1}),
    "DoRA": Way({"dora": True, "dropout": 0.1}),
    "DoRA, two ranks": Way({"dora": True, "dropout": 0.1}, world=2),
    "a tied output layer": Way({"modules_to_save": ("embed_tokens",)}),
    "an output layer": Way({"modules_to_save": ("lm_head",)}, family="qwen2"),
    "biases": Way({"bias": "all"}, family="qwen2"),
    "adapted layers' biases": Way({"bias": "lora_only", "dropout": 0.1}, family="qwen2"),
    "Conv1D's biases": Way({"bias": "all", "target_modules": ("c_attn",)}, family="gpt2"),
    "added tokens": Way({"added_tokens": ("<tool>", "again")}, family="qwen2"),
    "added tokens, tied": Way({"added_tokens": ("<tool>",), "dropout": 0.1}),
    "PiSSA": Way({"init": "pissa", "dropout": 0.1}),
    "PiSSA, rsLoRA": Way({"init": "pissa", "rank_stabilized": True}),
    "PiSSA, Conv1D": Way({"init": "pissa", "target_modules": ("c_attn",)}, family="gpt2"),
    "OLoRA": Way({"init": "olora", "target_modules": ("all-linear",)}, family="qwen2"),
    "nf4": Way({"dropout": 0.1}, quantization="nf4"),
    "nf4, DoRA": Way({"dora": True}, quantization="nf4"),
    "int8": Way({"target_modules": ("all-linear",)}, family="qwen2", quantization="int8"),
    "all at once, bfloat16": Way(
        {"dora": True, "rank_stabilized": True, "bias": "all", "modules_to_save": ("lm_head",), "dropout": 0.1},
        family="qwen2",
        dtype="bfloat16",
    ),
    "nf4, bfloat16": Way({"target_modules": ("all-linear",)}, quantization="nf4", dtype="bfloat16"),
    "PiSSA, bfloat16": Way({"init": "pissa"}, dtype="bfloat16"),
    "some weights": Way({}, full={"trainable": ("*layers.1.*",), "freeze": ("*mlp*",)}),
    "all but embeddings": Way({}, full={"freeze": ("*embed_tokens*",)}, family="qwen2"),
}


def _job(folder: Path, base: Path, way: Way, *, steps: int = 4, resume: Path | None = None) -> Job:
    return prepare(
        folder,
        base,
        [{**row, "prompt": f"<tool> {row['prompt']}"} for row in pairs(12)],
        world=way.world,
        lora=way.lora,
        full=FullSpec(**way.full) if way.full is not None else False,
        test=_HELD_OUT,
        training={"max_steps": steps},
        every=2,
        quantization=way.quantization,
        dtype=way.dtype,
        resume=resume,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    root = tmp_path_factory.mktemp("methods")
    jobs = {name: _job(root / str(index), models[way.family], way) for index, (name, way) in enumerate(WAYS.items())}
    runs = finish_each(jobs)
    resumed = {
        name: _job(root / f"{index}-again", models[way.family], way, resume=runs[name].paths.checkpoints / "step-2")
        for index, (name, way) in enumerate(WAYS.items())
    }
    return CheckedRuns({**runs, **{f"{name}, resumed": run for name, run in finish_each(resumed).items()}})


@pytest.mark.parametrize("way", WAYS)
def test_the_test_loss_falls_and_the_result_loads_on_the_original_base(
    way: str, runs: dict[str, FinishedRun], tmp_path: Path
) -> None:
    losses = runs[way].evals("test")
    assert losses[4] < losses[0] - 0.01
    model = result_loading.result(runs[way], **result_loading.quantized(WAYS[way].quantization))
    assert result_loading.loss(model, runs[way], tmp_path) == pytest.approx(losses[4], abs=WAYS[way].tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_a_method_resumes_to_the_bit(way: str, runs: dict[str, FinishedRun]) -> None:
    assert runs[f"{way}, resumed"].losses == runs[way].losses[2:]
    uninterrupted, resumed = (
        (run.paths.export / name).read_bytes()
        for run in (runs[way], runs[f"{way}, resumed"])
        for name in ("adapter_model.safetensors", "model.safetensors")
        if (run.paths.export / name).is_file()
    )
    assert uninterrupted == resumed


def test_examples_still_share_rows_and_logits_come_in_chunks(runs: dict[str, FinishedRun]) -> None:
    for way in WAYS:
        assert runs[way].decision("packing").choice == "on", way
        assert runs[way].decision("head").choice == ("whole logits" if "added" in way else "chunked"), way


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way].full is None])
def test_all_trained_weights_are_written_in_float32(way: str, runs: dict[str, FinishedRun]) -> None:
    tensors = load_file(runs[way].paths.export / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_rslora_only_changes_the_scale(runs: dict[str, FinishedRun]) -> None:
    """alpha / sqrt(rank) equals alpha' / rank with alpha' = alpha * sqrt(rank): 16 here instead of
    8."""
    config = json.loads((runs["rsLoRA"].paths.export / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 8, 4)
    scales = [_scale(runs[way]) for way in ("rsLoRA", "plain")]
    assert scales == [8 / 2, 8 / 4]


def _scale(run: FinishedRun) -> float:
    model = result_loading.result(run)
    return next(float(m.scaling["default"]) for m in model.modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize(("way", "rank"), [("PiSSA", 8), ("PiSSA, rsLoRA", 8), ("OLoRA", 8)])
def test_an_initialization_that_changes_the_base_is_written_as_an_adapter_of_twice_the_rank(
    way: str, rank: int, runs: dict[str, FinishedRun]
) -> None:
    config = json.loads((runs[way].paths.export / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (rank, 16, True)
    assert _scale(runs[way]) == pytest.approx(16 / 8**0.5 if "rs" in way else 2)


def test_doras_magnitudes_are_trained(runs: dict[str, FinishedRun]) -> None:
    tensors = load_file(runs["DoRA"].paths.export / "adapter_model.safetensors")
    magnitudes = [name for name in tensors if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == 4
    base = load_file(runs["DoRA"].paths.model / "model.safetensors")
    for name in magnitudes:
        weight = base[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")]
        assert (tensors[name] - weight.norm(dim=1)).abs().max() > 1e-3


def test_tied_embeddings_stay_tied(runs: dict[str, FinishedRun]) -> None:
    model = result_loading.result(runs["a tied output layer"])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(embedding.weight, head.weight)
    base = load_file(runs["a tied output layer"].paths.model / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(embedding.weight, base)


@pytest.mark.parametrize(("way", "tokens"), [("added tokens", ["<tool>", "again"]), ("added tokens, tied", ["<tool>"])])
def test_added_tokens_are_in_the_tokenizer_and_only_their_rows_are_written(
    way: str, tokens: list[str], runs: dict[str, FinishedRun]
) -> None:
    from transformers import AutoTokenizer

    before, after = (
        AutoTokenizer.from_pretrained(str(runs[way].paths.model)),
        AutoTokenizer.from_pretrained(str(runs[way].paths.export)),
    )
    assert [len(after(token).input_ids) for token in tokens] == [1] * len(tokens)
    assert after(" the lighthouse").input_ids == before(" the lighthouse").input_ids
    assert after.chat_template == before.chat_template
    tensors = load_file(runs[way].paths.export / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
    assert len(rows) == (1 if "tied" in way else 2)
    assert all(len(tensor) == len(tokens) for tensor in rows.values())


def test_only_weights_that_the_patterns_name_are_trained(runs: dict[str, FinishedRun]) -> None:
    for way, is_trained in (
        ("some weights", lambda name: "layers.1." in name and "mlp" not in name),
        ("all but embeddings", lambda name: "embed_tokens" not in name),
    ):
        written, base = (
            load_file(folder / "model.safetensors") for folder in (runs[way].paths.export, runs[way].paths.model)
        )
        assert written.keys() == base.keys()
        changed = {name for name in base if not torch.equal(written[name], base[name])}
        assert changed == {name for name in base if is_trained(name)}, way


@pytest.mark.parametrize("way", WAYS)
def test_the_trained_parameters_are_reported_and_were_estimated_before(
    way: str, runs: dict[str, FinishedRun], models: dict[str, Path]
) -> None:
    (plan,) = runs[way].events(events.PlanEvent)
    lora, full = LoraSpec(**{"rank": 4, "alpha": 8, **WAYS[way].lora}), WAYS[way].full
    size = model_size.read(models[WAYS[way].family], None if full else lora, FullSpec(**full) if full else None)
    share = runs[way].decision("trainable")
    assert share.choice == f"{plan.trainable_parameters / plan.parameters:.3%}"
    assert size.trained == pytest.approx(plan.trainable_parameters, rel=0.05)


@pytest.mark.parametrize(
    ("family", "lora", "message"),
    [
        ("llama", {"bias": "all"}, "method.lora.bias: the model has no bias to train with all; use none"),
        ("gpt2", {"target_modules": ("q_proj",)}, "it has c_attn, c_fc, c_proj"),
        (
            "gpt2",
            {"init": "olora", "target_modules": ("c_attn",)},
            "lora.init: olora doesn't support layers like",
        ),
        ("llama", {"init": "pissa", "target_modules": ("lm_head",)}, "out of the embeddings too, which are tied to it"),
        ("llama", {"init": "pissa", "rank": 17}, "method.lora.rank: pissa takes at most rank 16 out of model.layers.0"),
        (
            "llama",
            {"modules_to_save": ("lm_hed",)},
            "no module called lm_hed; besides its layers it has embed_tokens, l",
        ),
    ],
)
def test_a_name_that_the_model_lacks_is_reported_with_those_that_it_has(
    family: str, lora: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(RunError, match=message):
        adapters.adapt(loading.load(models[family], dtype=torch.float32, longest=16), LoraSpec(**lora), 1)


@pytest.mark.parametrize(
    ("full", "message"),
    [
        (
            {"freeze": ("model.layer.*",)},
            r"freeze: model\.layer\.\* matches no weight of the model; its names are like",
        ),
        ({"trainable": ("*.q_proj.*",), "freeze": ("*",)}, "every weight is frozen"),
    ],
)
def test_a_pattern_that_leaves_nothing_to_train_is_rejected(
    full: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(RunError, match=message):
        freezing.unfreeze(loading.load(models["llama"], dtype=torch.float32, longest=16), FullSpec(**full))
