"""The fits are those that `finetune plan` gives, and their pods' needs follow from the trainer."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from finetune_api.resource import ResourcesSpec
from finetune_api.scalars import quantity_value
from finetune_api.spec.hardware import Offload, Strategy
from finetune_cli import show_memory
from finetune_trainer.checkpoint import sharded
from finetune_trainer.parallel import strategy_choice
from finetune_trainer.parallel.free_memory import FreeMemory
from finetune_trainer.parallel.memory_estimate import ParallelConfig, memory_estimate
from sizing import pods
from sizing.fits import GPU_COUNTS, GPUS, METHODS, Fit, Gpu, Method, answer, fit_on, run_config, size_of
from sizing.models import MODELS, PublishedModel, tensor_shapes

_LORA, _QLORA, _FULL = METHODS
_LLAMA_8B = next(model for model in MODELS if model.name == "Llama-3.1-8B")
_WEIGHTS = 8_030_261_248
_ADAPTERS = 41_943_040
_HALF_GIB = 2**29
_WITHOUT_OFFLOADING: tuple[Strategy, ...] = ("ddp", "zero2", "fsdp")

_models = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
_methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
_gpus = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)


def _count(fit: Fit | None) -> float:
    return fit.gpus if fit else math.inf


@_models
@_methods
def test_larger_gpus_never_need_more_gpus(model: PublishedModel, method: Method) -> None:
    assert [gpu.free for gpu in GPUS] == sorted(gpu.free for gpu in GPUS)
    answers = [answer(model, method, gpu) for gpu in GPUS]
    without_offloading = [_count(each.on_gpus) for each in answers]
    at_all = [min(_count(each.on_gpus), _count(each.offloaded)) for each in answers]
    assert without_offloading == sorted(without_offloading, reverse=True)
    assert at_all == sorted(at_all, reverse=True)


@_models
@_methods
@_gpus
def test_no_smaller_number_of_gpus_fits_in_the_same_way(model: PublishedModel, method: Method, gpu: Gpu) -> None:
    each = answer(model, method, gpu)
    fits = {count: fit_on(model, method, gpu, count) for count in GPU_COUNTS}
    for count, fit in fits.items():
        assert fit is None or count >= min(known.gpus for known in each.fits)
        if fit is not None and fit.parallel.offload == "none":
            assert each.on_gpus is not None
            assert count >= each.on_gpus.gpus
    if each.offloaded is not None:
        assert each.offloaded.parallel.offload != "none"
        assert each.offloaded.gpus < _count(each.on_gpus)


@_models
@_methods
@_gpus
def test_auto_offloads_nothing_if_a_named_strategy_fits_without(
    model: PublishedModel, method: Method, gpu: Gpu
) -> None:
    """A strategy that a job names is tried even if its activations don't fit."""
    for count in GPU_COUNTS:
        automatic = fit_on(model, method, gpu, count)
        if automatic is None or automatic.parallel.offload != "none":
            supported = [strategy for strategy in _WITHOUT_OFFLOADING if method.name != "QLoRA" or strategy == "ddp"]
            named = [fit_on(model, method, gpu, count, strategy=strategy) for strategy in supported]
            assert not [fit for fit in named if fit is not None and fit.gpu_bytes <= gpu.usable]


@_models
@_methods
@_gpus
def test_more_host_memory_never_changes_the_choice_to_one_that_offloads(
    model: PublishedModel, method: Method, gpu: Gpu
) -> None:
    for count in GPU_COUNTS:
        fits = [fit_on(model, method, gpu, count, host=gib << 30) for gib in (8, 16, 32, 64, 128, 256, 512)]
        offloads = [fit.parallel.offload != "none" for fit in fits if fit is not None]
        assert offloads == sorted(offloads, reverse=True)


@_models
@_methods
@_gpus
def test_auto_makes_the_same_choice_with_the_memory_of_the_table(
    model: PublishedModel, method: Method, gpu: Gpu
) -> None:
    """Programs and /dev/shm take what is counted for them."""
    shared_memory = int(quantity_value(ResourcesSpec().shared_memory))
    for fit in answer(model, method, gpu).fits:
        free = (fit.memory_bytes - shared_memory) // fit.gpus - pods.PROCESS_BYTES
        assert fit_on(model, method, gpu, fit.gpus, host=free) == fit


@_methods
@_gpus
def test_finetune_plan_gives_the_same_answer(tmp_path: Path, method: Method, gpu: Gpu) -> None:
    _write_headers(tmp_path, _LLAMA_8B)
    for fit in answer(_LLAMA_8B, method, gpu).fits:
        run = run_config(method, fit.gpus)
        *_, last = show_memory.lines(run, tmp_path, FreeMemory("cuda", gpu.free, fit.memory_bytes // fit.gpus))
        assert last.startswith(f"  chosen: {fit.parallel} (")
        assert last.endswith(f"; micro-batches of {fit.tokens} tokens")


def _write_headers(folder: Path, model: PublishedModel) -> None:
    """Writes a model whose file has a header and a hole as large as its weights."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensor_shapes(model).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    (folder / "config.json").write_text(json.dumps(model.config))


@pytest.mark.parametrize(
    ("method", "gpus", "strategy", "offload", "expected"),
    [
        (_LORA, 1, "ddp", "none", 2 * _WEIGHTS + 4 * _ADAPTERS),  # the base is loaded
        (_LORA, 4, "ddp", "none", 4 * (2 * _WEIGHTS + 4 * _ADAPTERS)),  # by every process
        (_LORA, 4, "fsdp", "none", 2 * _WEIGHTS + 4 * _ADAPTERS),  # or only by the first
        (_FULL, 1, "ddp", "none", 12 * _WEIGHTS),  # a copy of weights and moments
        (_FULL, 4, "zero2", "none", 16 * _WEIGHTS),  # 4 copies of the weights in float32
        (_FULL, 8, "fsdp", "none", 12 * _WEIGHTS),
        (_FULL, 2, "zero2", "optimizer", (16 + 12) * _WEIGHTS),  # DeepSpeed's weights, moments and gradients; a copy
        (_FULL, 8, "zero2", "optimizer", 32 * _WEIGHTS),  # 8 copies of the weights need more than 16 + 12
        (_FULL, 4, "zero3", "parameters", (20 + 12) * _WEIGHTS),
    ],
)
def test_memory_is_what_loading_or_a_checkpoint_takes(
    method: Method, gpus: int, strategy: Strategy, offload: Offload, expected: int
) -> None:
    setup = strategy_choice.training_setup(run_config(method, gpus), half=True)
    estimate = memory_estimate(size_of(_LLAMA_8B, method), setup, ParallelConfig(strategy, offload))
    actual = pods.memory_bytes(setup, estimate)
    assert actual == expected + gpus * _HALF_GIB + 2 * _HALF_GIB


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (_LORA, 2 * _WEIGHTS + 4 * 12 * _ADAPTERS),
        (_QLORA, 2 * _WEIGHTS + 4 * 12 * _ADAPTERS),  # the files aren't quantized
        (_FULL, 2 * _WEIGHTS + 4 * 12 * _WEIGHTS),
    ],
)
def test_scratch_has_room_for_the_model_and_four_checkpoints(method: Method, expected: int) -> None:
    setup = strategy_choice.training_setup(run_config(method, 1), half=True)
    assert pods.scratch_bytes(size_of(_LLAMA_8B, method), setup) == expected


def test_a_checkpoint_has_as_many_bytes_as_the_trainer_counts() -> None:
    assert pods.CHECKPOINT_BYTES == sharded._VALUE_BYTES
