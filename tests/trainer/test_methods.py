"""What is trained beside plain LoRA: every variant learns, resumes to the bit, and what it writes loads by plain PEFT
on the base as it was, with the loss that the run told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api import events
from finetune_api.resource import FullSpec, LoraSpec
from finetune_trainer import adapters, freezing, model, model_size
from finetune_trainer.failure import Failed
from trainer import reload
from trainer.ranks import Checked, Ended, Job, finish_each, pairs, prepare

_HELD_OUT = pairs(5, 1)


@dataclass(frozen=True)
class Way:
    """`learnt` is how many parameters learn, from the sizes of the tiny model."""

    lora: dict[str, Any]
    family: str = "llama"
    world: int = 1
    full: dict[str, Any] | None = None
    quantization: str = "none"
    dtype: str = "float32"

    @property
    def close(self) -> float:
        """Of a loss that is computed again by others, in float32."""
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
def done(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Ended]:
    root = tmp_path_factory.mktemp("methods")
    jobs = {name: _job(root / str(at), models[way.family], way) for at, (name, way) in enumerate(WAYS.items())}
    done = finish_each(jobs)
    again = {
        name: _job(root / f"{at}-again", models[way.family], way, resume=done[name].paths.checkpoints / "step-2")
        for at, (name, way) in enumerate(WAYS.items())
    }
    return Checked({**done, **{f"{name}, resumed": ended for name, ended in finish_each(again).items()}})


@pytest.mark.parametrize("way", WAYS)
def test_a_method_learns_and_its_result_loads_on_the_base_as_it_was(
    way: str, done: dict[str, Ended], tmp_path: Path
) -> None:
    told = done[way].evals("test")
    assert told[4] < told[0] - 0.01
    found = reload.result(done[way], **reload.quantized(WAYS[way].quantization))
    assert reload.loss(found, done[way], tmp_path) == pytest.approx(told[4], abs=WAYS[way].close)


@pytest.mark.parametrize("way", WAYS)
def test_a_method_resumes_to_the_bit(way: str, done: dict[str, Ended]) -> None:
    assert done[f"{way}, resumed"].losses == done[way].losses[2:]
    whole, again = (
        (ended.paths.export / name).read_bytes()
        for ended in (done[way], done[f"{way}, resumed"])
        for name in ("adapter_model.safetensors", "model.safetensors")
        if (ended.paths.export / name).is_file()
    )
    assert whole == again


def test_examples_still_share_rows_and_logits_come_in_chunks(done: dict[str, Ended]) -> None:
    for way in WAYS:
        assert done[way].decision("packing").choice == "on", way
        assert done[way].decision("head").choice == ("whole logits" if "added" in way else "chunked"), way


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way].full is None])
def test_all_that_learns_is_written_in_float32(way: str, done: dict[str, Ended]) -> None:
    tensors = load_file(done[way].paths.export / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_rslora_is_another_scale_and_nothing_else(done: dict[str, Ended]) -> None:
    """alpha / sqrt(rank) is alpha' / rank with alpha' = alpha * sqrt(rank): 16 here instead of 8."""
    config = json.loads((done["rsLoRA"].paths.export / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 8, 4)
    scales = [_scale(done[way]) for way in ("rsLoRA", "plain")]
    assert scales == [8 / 2, 8 / 4]


def _scale(ended: Ended) -> float:
    found = reload.result(ended)
    return next(float(m.scaling["default"]) for m in found.modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize(("way", "rank"), [("PiSSA", 8), ("PiSSA, rsLoRA", 8), ("OLoRA", 8)])
def test_what_was_taken_out_of_the_base_is_written_as_an_adapter_of_twice_the_rank(
    way: str, rank: int, done: dict[str, Ended]
) -> None:
    config = json.loads((done[way].paths.export / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (rank, 16, True)
    assert _scale(done[way]) == pytest.approx(16 / 8**0.5 if "rs" in way else 2)


def test_doras_lengths_learn(done: dict[str, Ended]) -> None:
    tensors = load_file(done["DoRA"].paths.export / "adapter_model.safetensors")
    lengths = [name for name in tensors if name.endswith("lora_magnitude_vector")]
    assert len(lengths) == 4
    base = load_file(done["DoRA"].paths.model / "model.safetensors")
    for name in lengths:
        weight = base[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")]
        assert (tensors[name] - weight.norm(dim=1)).abs().max() > 1e-3


def test_tied_embeddings_stay_tied(done: dict[str, Ended]) -> None:
    found = reload.result(done["a tied output layer"])
    embedding, head = found.get_input_embeddings(), found.get_output_embeddings()
    assert torch.equal(embedding.weight, head.weight)
    base = load_file(done["a tied output layer"].paths.model / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(embedding.weight, base)


@pytest.mark.parametrize(("way", "tokens"), [("added tokens", ["<tool>", "again"]), ("added tokens, tied", ["<tool>"])])
def test_added_tokens_are_in_the_tokenizer_and_only_their_rows_are_written(
    way: str, tokens: list[str], done: dict[str, Ended]
) -> None:
    from transformers import AutoTokenizer

    before, after = (
        AutoTokenizer.from_pretrained(str(done[way].paths.model)),
        AutoTokenizer.from_pretrained(str(done[way].paths.export)),
    )
    assert [len(after(token).input_ids) for token in tokens] == [1] * len(tokens)
    assert after(" the lighthouse").input_ids == before(" the lighthouse").input_ids
    assert after.chat_template == before.chat_template
    tensors = load_file(done[way].paths.export / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
    assert len(rows) == (1 if "tied" in way else 2)
    assert all(len(tensor) == len(tokens) for tensor in rows.values())


def test_only_what_the_patterns_name_learns(done: dict[str, Ended]) -> None:
    for way, learns in (
        ("some weights", lambda name: "layers.1." in name and "mlp" not in name),
        ("all but embeddings", lambda name: "embed_tokens" not in name),
    ):
        written, base = (
            load_file(folder / "model.safetensors") for folder in (done[way].paths.export, done[way].paths.model)
        )
        assert written.keys() == base.keys()
        changed = {name for name in base if not torch.equal(written[name], base[name])}
        assert changed == {name for name in base if learns(name)}, way


@pytest.mark.parametrize("way", WAYS)
def test_what_learns_is_told_and_was_estimated_before(
    way: str, done: dict[str, Ended], models: dict[str, Path]
) -> None:
    (told,) = done[way].events(events.PlanEvent)
    lora, full = LoraSpec(**{"rank": 4, "alpha": 8, **WAYS[way].lora}), WAYS[way].full
    size = model_size.read(models[WAYS[way].family], None if full else lora, FullSpec(**full) if full else None)
    share = done[way].decision("trainable")
    assert share.choice == f"{told.trainable_parameters / told.parameters:.3%}"
    assert size.trained == pytest.approx(told.trainable_parameters, rel=0.05)


@pytest.mark.parametrize(
    ("family", "lora", "message"),
    [
        ("llama", {"bias": "all"}, "method.lora.bias: the model has no bias to train with all; use none"),
        ("gpt2", {"target_modules": ("q_proj",)}, "it has c_attn, c_fc, c_proj"),
        ("gpt2", {"init": "olora", "target_modules": ("c_attn",)}, "method.lora.init: olora can't read layers like"),
        ("llama", {"init": "pissa", "target_modules": ("lm_head",)}, "out of the embeddings too, which are tied to it"),
        ("llama", {"init": "pissa", "rank": 17}, "method.lora.rank: pissa takes at most rank 16 out of model.layers.0"),
        (
            "llama",
            {"modules_to_save": ("lm_hed",)},
            "no module called lm_hed; beside its layers it has embed_tokens, l",
        ),
    ],
)
def test_a_name_that_the_model_lacks_is_told_with_those_that_it_has(
    family: str, lora: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(Failed, match=message):
        adapters.adapt(model.load(models[family], dtype=torch.float32, longest=16), LoraSpec(**lora), 1)


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
def test_a_pattern_that_leaves_nothing_is_refused(full: dict[str, Any], message: str, models: dict[str, Path]) -> None:
    with pytest.raises(Failed, match=message):
        freezing.unfreeze(model.load(models["llama"], dtype=torch.float32, longest=16), FullSpec(**full))
