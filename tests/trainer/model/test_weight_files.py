"""A full model that is written weight by weight has the same files as one that Transformers saves
at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, MixtralConfig, MixtralForCausalLM

from finetune_trainer.model.result import weight_files


class _Weights:
    """Gathers a model's own weights, and records which of them are requested."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.requested: list[str] = []

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        self.requested.append(name)
        return self._model.get_parameter(name).detach().to(dtype, copy=True)  # type: ignore[no-any-return]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or "index" in path.name
    }


def _tensors(folder: Path) -> dict[str, list[float]]:
    return {
        name: tensor.flatten().tolist()
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def _mixtral(folder: Path) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=64, num_local_experts=3, num_key_value_heads=1))
    model.save_pretrained(folder)
    return MixtralForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shard_bytes", [20_000, 5 * 10**9], ids=["several files", "one file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "t5", "mixtral"])
def test_the_files_are_those_that_transformers_writes(
    family: str, dtype: torch.dtype, shard_bytes: int, models: dict[str, Path], tmp_path: Path
) -> None:
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = _mixtral(tmp_path / "base") if family == "mixtral" else auto.from_pretrained(models[family])
    weights = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "expected", state_dict=weights, max_shard_size=shard_bytes)
    gather = _Weights(model)
    (tmp_path / "written").mkdir()
    weight_files.write(tmp_path / "written", model, gather, dtype, shard_bytes)
    if family == "mixtral":  # Transformers writes all parts of a divided weight to one file, whatever its size
        assert _tensors(tmp_path / "written") == _tensors(tmp_path / "expected")
    else:
        assert _files(tmp_path / "written") == _files(tmp_path / "expected")
    assert gather.requested == [name for name, _ in model.named_parameters()]
    other = _Weights(model)
    weight_files.send(model, other, dtype)
    assert other.requested == gather.requested
