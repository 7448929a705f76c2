"""What can't be trained is refused when the model is built without its weights, and the ranks
refuse it for the same reason, whatever a library raises."""

from __future__ import annotations

import codecs
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.messages.run import RunConfig
from finetune_api.spec.recipe import FullSpec, LoraSpec
from finetune_trainer import model_folder, refusals
from finetune_trainer.data import pipeline
from finetune_trainer.errors import RunError
from finetune_trainer.model import families, freezing, loading, lora, method
from finetune_trainer.model.check import trial
from finetune_trainer.model_folder import Capacity, RowNeeds
from testkit import tiny_families, tiny_models
from testkit.rows import pairs
from trainer.support.rank_runs import prepare

_Spoil = Callable[[Path], object]
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1048576\n"


class _NoLog:
    def decision(self, topic: str, choice: str, reason: str) -> None:
        pass


def _file(name: str, content: bytes) -> _Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def _config(**settings: Any) -> _Spoil:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def _generation(content: Any) -> _Spoil:
    return _file("generation_config.json", (content if isinstance(content, str) else json.dumps(content)).encode())


def _weights(change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> _Spoil:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})

    return rewrite


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _with_mark(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


def _with_a_third_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    copies = {name.replace("layers.1.", "layers.2."): w.clone() for name, w in weights.items() if "layers.1." in name}
    return weights | copies


def _without_a_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if "layers.1." not in name}


_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_DEEP = b'{"model_type": "llama", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
_FOLDERS: dict[str, tuple[_Spoil, str]] = {
    "weights: a Git LFS pointer": (_file("model.safetensors", _POINTER), "model.safetensors is a Git LFS pointer"),
    "tokenizer: a Git LFS pointer": (_file("tokenizer.json", _POINTER), "tokenizer.json is a Git LFS pointer"),
    "config: a Git LFS pointer": (_file("config.json", _POINTER), "config.json is a Git LFS pointer"),
    "weights: empty": (_file("model.safetensors", b""), "model.safetensors is empty"),
    "weights: junk": (_file("model.safetensors", b'{"weights": 1}'), "isn't a safetensors file"),
    "weights: cut off": (_cut, "is cut off: its tensors take"),
    "weights: bytes of a quantization": (
        _weights(lambda weights: {name: weight.to(torch.int8) for name, weight in weights.items()}),
        "embed_tokens.weight as I8, which can't be trained",
    ),
    "weights: a layer is missing": (_weights(_without_a_layer), "weights lack model.layers.1.input_layernorm.weight"),
    "weights: a layer too many": (_weights(_with_a_third_layer), "model.layers.2 would be left out"),
    "weights: another shape": (
        _weights(lambda weights: weights | {"model.norm.weight": torch.zeros(7)}),
        "model.norm.weight has the shape (7,), and the configuration asks for (32,)",
    ),
    "an adapter beside": (_file("adapter_config.json", b'{"peft_type": "LORA"}'), "has adapter_config.json"),
    "GPTQ": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "are stored as gptq"),
    "AWQ": (_config(quantization_config={"quant_method": "awq"}), "are stored as awq"),
    "FP8": (_config(quantization_config={"quant_method": "fp8"}), "are stored as fp8"),
    "4 bits of bitsandbytes": (
        _config(quantization_config={"quant_method": "bitsandbytes"}), "with model.quantization: nf4 or int8",
    ),
    "weights of MLX": (_config(quantization={"group_size": 64, "bits": 4}), "are stored as quantized (quantization in"),
    "older compressed tensors": (_config(compression_config={"quant_method": "compressed-tensors"}), "as compressed-"),
    "HQQ": (_config(quantization_config={"quant_method": "hqq"}), "are stored as hqq (quantization_config in"),
    "ModelOpt": (_file("hf_quant_config.json", b"{}"), "has hf_quant_config.json, so its weights are quantized"),
    "AutoGPTQ": (_file("quantize_config.json", b"{}"), "has quantize_config.json, so its weights are quantized"),
    "weights: packed": (
        _weights(lambda weights: weights | {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, dtype=torch.int32)}),
        "stores model.layers.0.mlp.up_proj.qweight as I32, which can't be trained",
    ),
    "no method of a quantization": (_config(quantization_config={}), "are stored as quantized (quantization_config in"),
    "config: a byte order mark": (_with_mark, "config.json begins with a byte order mark"),
    "weights: of an adapter": (
        _weights(lambda weights: weights | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}),
        "model.layers.0.self_attn.q_proj.lora_A.weight is of an adapter, which would be left out",
    ),
    "weights: of a wrapper": (
        _weights(lambda weights: {f"module.{name}": weight for name, weight in weights.items()}),
        "the names of the weights begin with 'module.', which the model's don't",
    ),
    "a classifier": (
        _config(architectures=["LlamaForSequenceClassification"]), "is a LlamaForSequenceClassification (architectures",
    ),
    "padding beyond the vocabulary": (_config(pad_token_id=400), "pad_token_id 400, which isn't below its vocab_size"),
    "padding isn't a number": (_config(pad_token_id="x"), 'pad_token_id "x"'),
    "generation: a list": (_generation([1]), "generation_config.json holds a list"),
    "generation: cut off": (_generation('{"eos'), "generation_config.json isn't JSON"),
    "generation: a text": (_generation({"eos_token_id": "x"}), 'has eos_token_id "x"'),
    "generation: 10^30": (_generation(f'{{"eos_token_id": [2, 1{"0" * 30}]}}'), "eos_token_id 10000000"),
    "generation: 10^5000": (_generation(f'{{"eos_token_id": 1{"0" * 5000}}}'), "a number is too long"),
    "generation: an unknown cache": (_generation({"cache_implementation": "magic"}), "`cache_implementation` (magic)"),
    "config: nested deep": (_file("config.json", _DEEP), "config.json is nested too deeply"),
    "config: a list": (_file("config.json", b"[]"), "config.json holds a list"),
    "config: not UTF-8": (_file("config.json", b"\xff\xfe\x00"), "config.json isn't JSON"),
    "config: NaN": (_config(rms_norm_eps=float("nan")), "has a value that is NaN"),
    "config: no type": (_file("config.json", b"{}"), "has no model_type"),
    "config: an unknown type": (_config(model_type="unheard-of"), "the model_type 'unheard-of'"),
    "config: code of its own": (
        _config(model_type="own", auto_map={"AutoConfig": "own.Config"}), "needs the code that comes with the model",
    ),
    "config: no number format": (_config(dtype="float99"), 'dtype "float99", which is no number format'),
    "config: a format in a list": (_config(torch_dtype=["float32"]), 'torch_dtype ["float32"]'),
    "config: an unknown activation": (_config(hidden_act="magic"), "'magic' (the value of hidden_act)"),
    "config: the text of a lost peer": (_config(hidden_act="connection closed by peer"), "(the value of hidden_act)"),
    "config: no heads": (_config(num_attention_heads=0), "num_attention_heads 0"),
    "config: heads that don't divide": (_config(num_attention_heads=3), "not a multiple of the number of attention"),
    "config: 10^30 heads": (_config(num_key_value_heads=10**30), "num_key_value_heads 10000"),
    "config: another width": (_config(hidden_size=64), "the configuration asks for (300, 64) (as with 19 others)"),
    "config: fewer layers": (_config(num_hidden_layers=1), "model.layers.1 would be left out"),
    "config: more layers": (_config(num_hidden_layers=3), "weights lack model.layers.2.input_layernorm.weight"),
    "config: a billion layers": (_config(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "config: another vocabulary": (_config(vocab_size=400), "the configuration asks for (400, 32)"),
    "config: not tied": (_config(tie_word_embeddings=False), "weights lack lm_head.weight"),
    "config: an unknown rope": (_config(rope_parameters=_ROPE | {"rope_type": "magic"}), "rope_parameters.rope_type"),
    "config: rope without a factor": (_config(rope_scaling={"type": "linear"}), "{'factor'}"),
    "config: rope isn't an object": (_config(rope_parameters=[1]), "rope_parameters"),
    "config: a factor in words": (_config(rope_parameters=_ROPE | {"factor": "two"}), 'rope_parameters.factor "two"'),
    "config: a base of 0": (_config(rope_parameters=_ROPE | {"rope_theta": 0}), "rope_parameters.rope_theta 0"),
    "config: unknown layers": (_config(layer_types=["magic", "magic"]), "layer_types"),
    "config: a text part of 5": (_config(text_config=5), "has text_config 5, which isn't an object"),
    "config: an encoder that isn't": (_config(is_encoder_decoder=True), "no class that trains a llama encoder-decoder"),
    "tokenizer: a list": (_file("tokenizer.json", b"[]"), "no tokenizer can be loaded from the folder"),
    "tokenizer: settings in a list": (_file("tokenizer_config.json", b"[]"), "no tokenizer can be loaded"),
    "tokenizer: an end that isn't text": (_file("tokenizer_config.json", b'{"eos_token": 5}'), "eos_token has to be"),
}  # fmt: skip
_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "targets: no such name": ({"lora": {"target_modules": ("nope",)}}, "no linear layer called nope; it has down_proj"),
    "targets: a norm": ({"lora": {"target_modules": ("norm",)}}, "no linear layer called norm"),
    "modulesToSave: no such name": ({"lora": {"modules_to_save": ("nope",)}}, "no module called nope"),
    "modulesToSave: quantized": (
        {"quantization": "nf4", "lora": {"modules_to_save": ("q_proj",)}}, "self_attn.q_proj is quantized",
    ),
    "no biases": ({"lora": {"bias": "all"}}, "no bias to train with all"),
    "PiSSA of a high rank": ({"lora": {"init": "pissa", "rank": 400}}, "pissa takes at most rank 32"),
    "merging into a tied head": ({"merge": True, "lora": {"target_modules": ("lm_head",)}}, "output.merge: the base's"),
    "full: no such name": ({"full": FullSpec(trainable=("nope*",))}, "nope* matches no weight"),
    "full: everything frozen": ({"full": FullSpec(freeze=("*",))}, "every weight is frozen"),
}  # fmt: skip
_WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "all-linear": {"lora": {"target_modules": ("all-linear",)}},
    "DoRA": {"lora": {"dora": True}},
    "OLoRA": {"lora": {"init": "olora"}},
    "PiSSA": {"lora": {"init": "pissa"}},
    "addedTokens": {"lora": {"added_tokens": ("<tool>",)}},
    "modulesToSave": {"lora": {"modules_to_save": ("embed_tokens",)}},
    "merged": {"merge": True},
    "nf4 with DoRA": {"quantization": "nf4", "lora": {"dora": True}},
    "int8": {"quantization": "int8"},
    "full": {"full": True},
}

_FAMILIES: dict[str, Callable[[Path], Path]] = {
    **tiny_families.TRAINABLE,
    "gpt2": tiny_models.tiny_gpt2,
    "t5": tiny_models.tiny_t5,
    "phi3": tiny_models.tiny_phi3,
    "gemma2": tiny_models.tiny_gemma2,
    "gpt-oss": tiny_models.tiny_gpt_oss,
    "mixtral": tiny_models.tiny_mixtral,
    "qwen2-moe": tiny_models.tiny_qwen2_moe,
    "qwen3-moe": tiny_models.tiny_qwen3_moe,
}


def _by_ranks(run: RunConfig, folder: Path) -> Capacity:
    """Loads the model and applies the method as a rank does."""
    tokenizer = pipeline.load_renderer(folder, run.data, run.added_tokens).tokenizer
    quantized = method.quantized(run, torch.device("cpu"), torch.float32, _NoLog())
    loaded = loading.load(folder, dtype=torch.float32, longest=30, quantized=quantized)
    return method.capacity(method.apply(run, folder, loaded, tokenizer, RowNeeds(5, 0, 30), _NoLog()))


def _refusals(run: RunConfig, folder: Path) -> list[tuple[str, str]]:
    """Returns (reason, message) of the check without weights, and of the ranks."""
    refused = []
    for build in (lambda: trial.build(run, folder, []), lambda: _by_ranks(run, folder)):
        with pytest.raises(RunError) as error:
            build()
        refused.append((error.value.reason, error.value.message))
    return refused


@pytest.mark.parametrize(("spoil", "message"), _FOLDERS.values(), ids=_FOLDERS)
def test_a_folder_is_refused_before_gpus_are_allocated_and_by_the_ranks(
    spoil: _Spoil, message: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "base")
    spoil(folder)
    before, by_ranks = _refusals(prepare(tmp_path / "job", folder, pairs(2)).run, folder)
    assert before[0] == by_ranks[0] == "ModelInvalid"
    assert re.search(re.escape(message), before[1]), before[1]
    assert before[1].startswith("model.uri: ")
    assert ";" in before[1]  # a remedy
    if "tokenizer.json is a" not in before[1]:  # the supervisor looks for pointers before it starts ranks
        assert by_ranks[1] == before[1]


@pytest.mark.parametrize(("options", "message"), _SETTINGS.values(), ids=_SETTINGS)
def test_a_setting_is_refused_before_gpus_are_allocated_and_by_the_ranks(
    options: dict[str, Any], message: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    before, by_ranks = _refusals(prepare(tmp_path / "job", models["llama"], pairs(2), **options).run, models["llama"])
    assert before == by_ranks
    assert before[0] == "InvalidConfig"
    assert message in before[1]


@pytest.mark.parametrize("way", _WAYS)
def test_what_can_be_trained_passes(way: str, tmp_path: Path, models: dict[str, Path]) -> None:
    run = prepare(tmp_path / "job", models["llama"], pairs(2), **_WAYS[way]).run
    lines: list[str] = []
    assert trial.build(run, models["llama"], lines) == _by_ranks(run, models["llama"])
    assert lines[-1].startswith("trainable: ")


@pytest.mark.parametrize("family", _FAMILIES)
def test_every_family_is_built_and_called_without_weights(family: str, tmp_path: Path) -> None:
    folder = _FAMILIES[family](tmp_path / "base")
    run = prepare(tmp_path / "job", folder, pairs(2), lora={"target_modules": ("all-linear",)}).run
    assert trial.build(run, folder, []) == _by_ranks(run, folder)


@pytest.mark.parametrize(("build", "message"), tiny_families.REFUSED.values(), ids=tiny_families.REFUSED)
def test_a_model_that_doesnt_generate_text_is_refused(
    build: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    folder = build(tmp_path / "base")
    before, by_ranks = _refusals(prepare(tmp_path / "job", folder, pairs(2)).run, folder)
    assert before == by_ranks
    assert before[0] == "ModelInvalid"
    assert message in before[1]


def test_what_peft_refuses_to_adapt_is_a_wrong_setting(tmp_path: Path) -> None:
    folder = tiny_families.tiny_mamba(tmp_path / "base")
    options = {"lora": {"target_modules": ("all-linear",)}}
    before, by_ranks = _refusals(prepare(tmp_path / "job", folder, pairs(2), **options).run, folder)
    assert before == by_ranks
    assert before[0] == "InvalidConfig"
    assert "incompatible with Mamba" in before[1]


def test_int8_is_refused_for_layers_that_get_more_than_sequences(tmp_path: Path) -> None:
    folder = tiny_families.tiny_deepseek_v3(tmp_path / "base")
    options: dict[str, Any] = {"quantization": "int8", "lora": {"target_modules": ("q_b_proj",)}}
    job = prepare(tmp_path / "job", folder, pairs(4), **options, training={"max_steps": 1})
    with pytest.raises(RunError) as refused:
        trial.build(job.run, folder, [])
    by_ranks = job.finish().failure
    for reason, message in ((refused.value.reason, refused.value.message), (by_ranks.reason, by_ranks.message)):
        assert reason == "InvalidConfig"
        assert message.startswith("model.quantization: int8 can't be used with this model, whose layer ")
        assert "kv_b_proj gets tensors of 4 dimensions" in message
        assert message.endswith("; use nf4, or none")


def _without_an_expert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if "layers.0" not in name or "experts.3." not in name}


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.tiny_mixtral(tmp_path / "base")
    assert any("experts.3." in name for name in load_file(folder / "model.safetensors"))
    _weights(_without_an_expert)(folder)
    for reason, message in _refusals(prepare(tmp_path / "job", folder, pairs(2)).run, folder):
        assert reason == "ModelInvalid"
        assert "experts" in message


def test_settings_that_dont_fit_together_are_found_by_computing_without_data(
    tmp_path: Path,
) -> None:
    folder = tiny_models.tiny_mixtral(tmp_path / "base")
    _config(num_experts_per_tok=9)(folder)
    run = prepare(tmp_path / "job", folder, pairs(2)).run
    with pytest.raises(RunError, match=r"model\.uri: the model can't compute a text: .*; compare") as refused:
        trial.build(run, folder, [])
    assert refused.value.reason == "ModelInvalid"


_CAPACITY = Capacity(embeddings=300, source_positions=40, positions=30)


@pytest.mark.parametrize(
    ("rows", "reason", "message"),
    [
        (RowNeeds(299, 40, 30), "", ""),
        (RowNeeds(300, 4, 4), "ModelInvalid", "token 300 of the folder's tokenizer, but the model has only 300"),
        (RowNeeds(9, 41, 4), "InvalidConfig", "a prompt of 41 tokens, but the model has 40 positions"),
        (RowNeeds(9, 4, 31), "InvalidConfig", "a row of 31 tokens, but the model has 30 positions"),
    ],
)
def test_rows_of_an_encoder_decoder_have_positions_for_prompts_and_answers(
    rows: RowNeeds, reason: str, message: str
) -> None:
    if not reason:
        model_folder.check_rows(_CAPACITY, rows)
        return
    with pytest.raises(RunError, match=re.escape(message)) as refused:
        model_folder.check_rows(_CAPACITY, rows)
    assert refused.value.reason == reason


def test_all_linear_adapts_the_text_part_of_a_model_that_reads_images(tmp_path: Path) -> None:
    folder = tiny_families.tiny_gemma3_multimodal(tmp_path / "base")
    loaded = loading.load(folder, dtype=torch.float32, longest=30)
    assert loaded.window == 8
    assert families.parts_without_text(loaded.base) == ("model.vision_tower", "model.multi_modal_projector")
    for targets in (("all-linear",), ("q_proj", "v_proj")):
        model = lora.adapt(loading.load(folder, dtype=torch.float32, longest=30), LoraSpec(target_modules=targets), 1)
        trained = [name for name, p in model.model.named_parameters() if p.requires_grad]
        assert trained
        assert all(".language_model.layers." in name for name in trained)
    full = freezing.unfreeze(loaded)
    assert not any(p.requires_grad for name, p in full.base.named_parameters() if "vision" in name)
    assert full.trainable > 0


_ERRORS: dict[str, tuple[BaseException, bool]] = {
    "a wrong type": (TypeError("'<' not supported between instances of 'str' and 'int'"), True),
    "a missing key": (KeyError("connection closed by peer"), True),
    "a shape": (RuntimeError("The size of tensor a (4) must match the size of tensor b (3)"), True),
    "nested too deep": (RecursionError("maximum recursion depth exceeded"), True),
    "no such file": (FileNotFoundError(2, "No such file or directory"), True),
    "no memory": (MemoryError(), False),
    "no memory for a tensor": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), False),
    "a full disk": (OSError(28, "No space left on device"), False),
    "a disk that fails": (OSError(5, "Input/output error"), False),
    "a GPU": (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    "a lost peer": (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), False),
    "a request to stop": (KeyboardInterrupt(), False),
    "a reason already": (RunError("DatasetInvalid", "row 3"), False),
}


@pytest.mark.parametrize(("error", "refused"), _ERRORS.values(), ids=_ERRORS)
def test_only_what_the_input_causes_is_blamed_on_it(error: BaseException, refused: bool) -> None:
    with pytest.raises(BaseException) as raised, refusals.raising("ModelInvalid", "model.uri", "change it"):  # noqa: PT011
        raise error
    if refused:
        assert isinstance(raised.value, RunError)
        assert raised.value.reason == "ModelInvalid"
        assert raised.value.message.endswith("; change it")
    else:
        assert raised.value is error
