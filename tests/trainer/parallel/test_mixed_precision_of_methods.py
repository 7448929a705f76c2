"""In bfloat16, every kind of adapter, preference pairs and nf4 bases compute the same where the
autocast is CUDA's, and trained weights of any kind are stored in float32.

test_mixed_precision.py says why the question without a device matters, and has plain adapters and
full training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from finetune_api.resource import LoraSpec
from finetune_trainer.model import loading, lora
from testkit.rows import pairs
from trainer.support import product_records
from trainer.support.product_records import ProductRecords
from trainer.support.rank_runs import CheckedRuns, FinishedRun, Job, finish_each, prepare

_PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in pairs(12)]
_ALL_LINEAR = {"target_modules": ("all-linear",), "dropout": 0.1}
_METHODS: dict[str, dict[str, Any]] = {
    "dora": {"lora": {**_ALL_LINEAR, "dora": True}},
    "rslora": {"lora": {**_ALL_LINEAR, "rank_stabilized": True}},
    "trained modules": {"lora": {"modules_to_save": ("lm_head",)}, "family": "qwen2"},
    "biases": {"lora": {"bias": "all"}, "family": "qwen2"},
    "dpo": {"rows": _PAIRS, "data": {"format": "preference"}, "training": {"objective": "dpo"}},
    "nf4": {"quantization": "nf4", "lora": _ALL_LINEAR},
}
_CELLS: tuple[tuple[str, str], ...] = (
    ("dora", "zero2"), ("rslora", "fsdp"), ("trained modules", "zero2"), ("trained modules", "fsdp"),
    ("biases", "zero2"), ("dpo", "zero2"), ("dpo", "fsdp"), ("nf4", "ddp"),
)  # fmt: skip


def _job(folder: Path, models: dict[str, Path], cell: tuple[str, str]) -> Job:
    options = dict(_METHODS[cell[0]])
    model, rows = models[options.pop("family", "llama")], options.pop("rows", pairs(24))
    training = {"max_steps": 2, **options.pop("training", {})}
    return prepare(
        folder, model, rows, world=2, strategy=cell[1], dtype="bfloat16", training=training, every=2, **options
    )


def _runs(root: Path, models: dict[str, Path], records: ProductRecords) -> CheckedRuns[tuple[str, str]]:
    jobs = {cell: _job(root / str(index), models, cell) for index, cell in enumerate(_CELLS)}
    return CheckedRuns(finish_each(jobs, records))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> CheckedRuns[tuple[str, str]]:
    return _runs(tmp_path_factory.mktemp("cpu"), models, ProductRecords())


@pytest.fixture(scope="module")
def as_on_cuda(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> CheckedRuns[tuple[str, str]]:
    return _runs(tmp_path_factory.mktemp("cuda"), models, ProductRecords(cuda_autocast=True))


@pytest.mark.parametrize("cell", _CELLS, ids=", ".join)
def test_cudas_autocast_gives_the_losses_of_the_cpus(
    cell: tuple[str, str], on_cpu: dict[Any, FinishedRun], as_on_cuda: dict[Any, FinishedRun]
) -> None:
    assert len(on_cpu[cell].losses) == 2
    assert as_on_cuda[cell].losses == on_cpu[cell].losses
    for ended in (on_cpu[cell], as_on_cuda[cell]):
        assert "bfloat16" in {product.computed for product in product_records.read(ended.paths)}


@pytest.mark.parametrize("cell", _CELLS, ids=", ".join)
def test_what_is_trained_and_its_moments_are_stored_in_float32(
    cell: tuple[str, str], as_on_cuda: dict[Any, FinishedRun]
) -> None:
    folder = as_on_cuda[cell].paths.checkpoints / "step-2"
    formats = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            formats |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert formats == {"F32"}


@pytest.mark.parametrize("modules", [("embed_tokens",), ("norm", "input_layernorm"), ("embed_tokens", "lm_head")])
def test_activations_have_the_bases_format_if_copies_of_its_modules_are_trained(
    modules: tuple[str, ...], models: dict[str, Path]
) -> None:
    """The copies are float32, which would make all activations between products float32."""
    loaded = loading.load(models["qwen2"], dtype=torch.bfloat16, longest=16)
    model = lora.adapt(loaded, LoraSpec(rank=2, target_modules=("q_proj",), modules_to_save=modules), 1).model
    formats = set()
    for layer in loading.layers(loaded.base):
        layer.register_forward_hook(lambda _, inputs, output: formats.update({inputs[0].dtype, output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(8)[None]).logits.float().sum().backward()
    assert formats == {torch.bfloat16}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(parameter.grad is not None for parameter in trained if parameter.dim() == 2)
