"""Creates models with random weights, rows, and the scratch folder of a run, without downloads.

Weights of small models come from numpy's generator, so they are the same bytes on every machine,
and their losses can be compared with those of a CPU. Weights of large ones are created on the
device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from finetune_api.messages.run import CheckpointSpec, DataConfig, JobRef, Location, ModelConfig, RunConfig, WorldConfig
from finetune_api.resource import EvaluationSpec, LoraSpec, TrainingSpec
from finetune_trainer.paths import Paths
from testkit import tiny_models
from testkit.rows import pairs

SHARD_BYTES = 2 << 30
_SPREAD = 0.02  # standard deviation of a weight


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama model."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int

    def config(self) -> Any:
        """Returns the LlamaConfig of these dimensions."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=self.layers, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_attention_heads=self.heads, num_key_value_heads=self.key_heads, vocab_size=self.vocabulary,
            max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False, **_token_ids(),
        )  # fmt: skip


LLAMA_30M = Shape("Llama 30M", 8, 512, 1408, 8, 4, 4096)
LLAMA_1B = Shape("Llama 3.2 1B's shape", 16, 2048, 8192, 32, 8, 128256)
LLAMA_3B = Shape("Llama 3.2 3B's shape", 28, 3072, 8192, 24, 8, 128256)
LLAMA_8B = Shape("Llama 3.1 8B's shape", 32, 4096, 14336, 32, 8, 128256)
TINY = Shape("a tiny Llama", 2, 64, 128, 4, 2, 512)


def family(name: str, *, tiny: bool) -> Any:
    """Returns the configuration of a small model (about 20 million weights) of another family.

    Raises ValueError if `name` is unknown.
    """
    from transformers import Gemma2Config, Gemma3TextConfig, GptOssConfig

    width, layers, middle, size = (64, 2, 128, 16) if tiny else (512, 4, 1408, 64)
    common: dict[str, Any] = {
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": middle, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": size, "vocab_size": 512, "max_position_embeddings": 4096, **_token_ids(),
    }  # fmt: skip
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    if name == "gemma2":
        return Gemma2Config(**common, query_pre_attn_scalar=size, sliding_window=4096, layer_types=kinds)
    if name == "gemma3":
        return Gemma3TextConfig(**common, query_pre_attn_scalar=size, sliding_window=16, layer_types=kinds)
    if name == "gpt-oss":
        return GptOssConfig(
            **common, sliding_window=16, layer_types=kinds, num_local_experts=4, num_experts_per_tok=2
        )  # fmt: skip
    raise ValueError(f"there is no family {name!r} here")


def write_model(folder: Path, config: Any, *, seed: int = 0) -> Path:
    """Writes a small model in float32, with the same bytes on every machine; returns its folder."""
    generator = np.random.Generator(np.random.PCG64(seed))
    tensors = {name: torch.from_numpy(_weight(name, shape, generator, config)) for name, shape in _shapes(config)}
    _save(folder, config, [tensors], torch.float32)
    return folder


def write_large_model(folder: Path, shape: Shape, device: str, *, seed: int = 0) -> Path:
    """Writes a model in bfloat16, created on the device shard by shard, unless it exists."""
    if (folder / "config.json").is_file():
        return folder
    config = shape.config()
    generator = torch.Generator(device).manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, dimensions in _shapes(config):
        if size >= SHARD_BYTES:
            shards.append({})
            size = 0
        weight = torch.ones(dimensions, dtype=torch.bfloat16)
        if len(dimensions) > 1:
            values = torch.empty(dimensions, dtype=torch.bfloat16, device=device)
            weight = values.normal_(0.0, _SPREAD, generator=generator).cpu()
        shards[-1][name] = weight
        size += weight.numel() * weight.itemsize
    _save(folder, config, shards, torch.bfloat16)
    return folder


def _shapes(config: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Returns name and shape of every weight, in the model's order; tied weights occur once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def _weight(name: str, shape: tuple[int, ...], generator: np.random.Generator, config: Any) -> np.ndarray[Any, Any]:
    if len(shape) == 1 and "norm" in name:
        is_offset = str(config.model_type).startswith("gemma")  # its norms multiply by 1 + weight
        return np.full(shape, 0.0 if is_offset else 1.0, np.float32)
    width = np.float32(_SPREAD * 3**0.5)
    return (generator.random(shape, dtype=np.float32) * 2 - 1) * width


def _save(folder: Path, config: Any, shards: list[dict[str, torch.Tensor]], dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for file, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tiny_models.tokenizer().save_pretrained(folder)
    config.dtype = dtype
    config.architectures = [_architecture(config)]
    config.save_pretrained(folder)  # last: a folder with this file is complete


def _architecture(config: Any) -> str:
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)


def _token_ids() -> dict[str, int]:
    tokens = {"pad_token_id": tiny_models.PAD, "bos_token_id": tiny_models.BOS, "eos_token_id": tiny_models.TURN_END}
    return {name: tiny_models.SPECIAL_TOKENS.index(token) for name, token in tokens.items()}


@dataclass(frozen=True)
class Recipe:
    """The options of a run of one rank. Rows longer than `longest` tokens are truncated."""

    strategy: str = "ddp"
    offload: str = "none"
    lora: Mapping[str, Any] | None = field(default_factory=dict)  # None: full training
    quantization: str = "none"
    training: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    packing: bool = True
    longest: int = 128
    validation: Sequence[Mapping[str, Any]] = ()
    test: Sequence[Mapping[str, Any]] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    every: int | str = "auto"
    resume: Path | None = None  # a checkpoint's folder


def preferences(count: int) -> list[dict[str, str]]:
    """Returns rows for DPO."""
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{other['completion']} no"}
        for row, other in zip(pairs(count), pairs(count, 50), strict=True)
    ]


def documents(count: int, tokens: int) -> list[dict[str, str]]:
    """Returns prompts and answers of about `tokens` tokens in total, 90 % of them in the answer."""
    text = " ".join(row["prompt"] + row["completion"] for row in pairs(200))
    characters = int(tokens / _tokens_per_character(text[:400]))
    text = text * (2 + 2 * characters // len(text))
    rows = []
    for index in range(count):
        begin = 37 * index % len(text)
        prompt = text[begin : begin + characters // 10]
        rows.append({"prompt": f"{index}: {prompt}", "completion": f" {text[begin : begin + characters * 9 // 10]}"})
    return rows


@cache
def _tokens_per_character(text: str) -> float:
    return len(tiny_models.tokenizer()(text).input_ids) / len(text)


def prepare(
    scratch: Path, model: Path, rows: Sequence[Mapping[str, Any]], recipe: Recipe, *, device: str, threads: int = 2
) -> Paths:
    """Fills a scratch folder as the supervisor does before it starts ranks; returns its paths."""
    paths = Paths(scratch)
    for folder in (paths.data("train").parent, paths.events, paths.checkpoints, paths.rank_log(0).parent):
        folder.mkdir(parents=True, exist_ok=True)
    paths.model.symlink_to(model)
    if recipe.resume is not None:
        paths.resume.symlink_to(recipe.resume)
    locations: dict[str, Location | None] = {}
    for split, split_rows in (("train", rows), ("validation", recipe.validation), ("test", recipe.test)):
        if split_rows:
            paths.data(split).write_text("".join(json.dumps(row) + "\n" for row in split_rows))
        locations[split] = _location(f"{split}.jsonl") if split_rows else None
    assert locations["train"] is not None
    run = RunConfig(
        job=JobRef(namespace="gpu-check", name="check", uid="u-1", attempt=1),
        model=ModelConfig(location=_location("file:///model"), dtype=recipe.dtype, quantization=recipe.quantization),  # type: ignore[arg-type]
        data=DataConfig(
            train=locations["train"], validation=locations["validation"], test=locations["test"],
            max_sequence_length=recipe.longest, packing=recipe.packing,
        ),
        method="full" if recipe.lora is None else "lora",
        lora=None if recipe.lora is None else LoraSpec(**{"rank": 8, "alpha": 16, "dropout": 0.0, **recipe.lora}),
        training=TrainingSpec(
            **{"global_batch_size": 8, "learning_rate": 1e-3, "warmup_ratio": 0.0, "max_steps": 10, **recipe.training}
        ),
        world=WorldConfig(
            strategy=recipe.strategy, offload=recipe.offload, device=device, threads_per_process=threads  # type: ignore[arg-type]
        ),
        checkpoint=CheckpointSpec(every=recipe.every),  # type: ignore[arg-type]
        evaluation=EvaluationSpec(**recipe.evaluation),
        output=_location("file:///out"),
        scratch=str(scratch),
    )  # fmt: skip
    paths.run_config.write_text(json.dumps(run.to_json()))
    return paths


def _location(uri: str) -> Location:
    return Location(uri=uri, display=uri)
