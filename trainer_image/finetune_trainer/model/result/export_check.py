"""Checks a written result before it is reported as saved: loaded as a user would load it, it must
give the same logits as the model in the training process.

All ranks compute the logits for `probe` together. Only rank 0 runs `check`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune_api.messages.run import RunConfig
from finetune_trainer.data import tokenizer
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.splits import Split
from finetune_trainer.errors import RunError
from finetune_trainer.host_memory import release_unused
from finetune_trainer.model import added_tokens
from finetune_trainer.model.device_memory import free_bytes
from finetune_trainer.model.quantization import Quantization, disable_repacking
from finetune_trainer.model.result import adapter_merge, export
from finetune_trainer.reporting.event_writer import EventWriter

_CPU = torch.device("cpu")
_TOKENS = 64
_CANDIDATES = 32
# Relative to the size of the logits. Other kernels sum in a different order, and half precision
# rounds to 2^-8 in every layer.
TOLERANCE = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_MEMORY_FACTOR = 1.3  # times the size of the weights: what it takes to load and use a model
_TENSORS_IN_FLIGHT = 4  # Transformers reads this many at a time (core_model_loading.GLOBAL_WORKERS)
# What quantizing each weight as it is read leaves of the size; embeddings aren't quantized.
_QUANTIZED_SHARE = {"none": 1.0, "int8": 0.65, "nf4": 0.5}


@dataclass(frozen=True)
class Probe:
    """Holds the first tokens of a training example and the trained model's logits for them, both on
    the CPU.

    `dtype` is the number format of the base's weights in memory.
    """

    inputs: dict[str, Tensor]
    logits: Tensor
    dtype: torch.dtype
    autocast: torch.dtype | None
    encoder_decoder: bool


@dataclass(frozen=True)
class Memory:
    """Bytes that a second copy of a model needs, and that are free.

    Its weights take `needed` bytes on the device that computes; `passing` is what the host needs
    while it loads them for a GPU. `host` and `gpu` are free.
    """

    needed: int
    passing: int
    host: int
    gpu: int


@dataclass(frozen=True)
class WrittenResult:
    """Holds the folder of a result, the configuration of the run that wrote it, and the folder of
    its base model."""

    folder: Path
    run: RunConfig
    base: Path


@dataclass(frozen=True)
class _Load:
    """Describes a part of the result: how it is loaded, given a number format and a device, and the
    number format of the check."""

    name: str
    topic: str
    load: Callable[..., Any]
    dtype: torch.dtype
    quantization: Literal["none", "int8", "nf4"] = "none"


def example(train: Split, collate: Collator) -> dict[str, Tensor]:
    """Returns the model's inputs for the first tokens of one training example, the same on every
    rank."""
    lengths = train.lengths[:_CANDIDATES]
    batch = replace(collate, packed=False, shared=False)(train, (int(lengths.argmax()),))
    return {name: tensor[:, :_TOKENS].contiguous() for name, tensor in batch.inputs.items()}


def probe(inputs: Mapping[str, Tensor], logits: Tensor, autocast: torch.dtype | None, run: RunConfig) -> Probe:
    """Returns a probe of `inputs`, which come from `example`, and the trained model's `logits`."""
    dtype = torch.float32 if autocast is None or run.method == "full" else autocast
    encoder_decoder = "decoder_input_ids" in inputs
    return Probe({name: tensor.cpu() for name, tensor in inputs.items()}, logits, dtype, autocast, encoder_decoder)


def check(result: WrittenResult, probe: Probe, reporter: EventWriter, device: torch.device) -> None:
    """Loads every part of the result that fits into memory, and logs each comparison.

    Raises RunError(ResultMismatch) if the logits of a part differ by more than rounding explains.
    """
    _forget_deepspeed()
    for part in _parts(result, probe, device):
        release_unused()
        total, largest = _weight_bytes(result.base, part.dtype)
        memory = Memory(
            needed=int(total * _QUANTIZED_SHARE[part.quantization]),
            passing=largest * _TENSORS_IN_FLIGHT,
            host=free_bytes(torch.device("cpu"), 1),
            gpu=_free_gpu_bytes(device),
        )
        target, reason = reload_device(memory, needs_gpu=part.quantization != "none" and device.type == "cuda")
        if target == "nowhere":
            reporter.decision(part.topic, "not loaded", reason)
            continue
        reporter.heartbeat()
        target_device = device if target == "gpu" else _CPU
        model = part.load(part.dtype, device=target_device).eval()
        coarsest = max((part.dtype, probe.dtype, probe.autocast or probe.dtype), key=lambda d: TOLERANCE[d])
        difference = distance(_logits(model, probe, target_device), probe.logits)
        del model
        gc.collect()
        tokens = probe.logits.shape[-2]
        if not difference <= TOLERANCE[coarsest]:
            raise RunError(
                "ResultMismatch",
                f"the written {part.name}, loaded again, differs from the trained one: its logits for {tokens} tokens "
                f"differ by {difference:.2g} of their size, and rounding explains at most {TOLERANCE[coarsest]:.0e}",
            )
        logits = f"the written {part.name} gives the trained logits of {tokens} tokens to {difference:.1e}"
        reporter.decision(part.topic, "equal", f"{logits} ({reason})")


def reload_device(memory: Memory, *, needs_gpu: bool = False) -> tuple[str, str]:
    """Returns ("gpu", "cpu" or "nowhere"; the reason).

    On the way to a GPU, tensors pass through the host's memory, so both must have room. With
    `needs_gpu`, the result was trained on a base that a GPU quantized: a CPU may round the
    constants differently, so it is loaded there or not at all. This function is pure.
    """
    need, host, gpu = int(memory.needed * _MEMORY_FACTOR), memory.host, memory.gpu
    if gpu >= need and host >= memory.passing:
        return "gpu", f"loaded next to the trained one: {need / 1e9:.1f} GB of {gpu / 1e9:.1f} GB free"
    if host >= need and not needs_gpu:
        return "cpu", f"loaded in the host's memory: {need / 1e9:.1f} GB of {host / 1e9:.1f} GB free"
    compared = "only the values in the files were compared"
    if gpu >= need:
        passing = f"{memory.passing / 1e9:.1f} GB in the host's memory, which has {host / 1e9:.1f} GB free"
        return "nowhere", f"tensors on their way to the GPU need {passing}: {compared}; raise resources.memory"
    if needs_gpu:
        free = f"{need / 1e9:.1f} GB of the GPU, which has {gpu / 1e9:.1f} GB free"
        return "nowhere", f"the base was quantized on a GPU, and a second copy needs {free}: {compared}"
    return (
        "nowhere",
        f"a second copy needs {need / 1e9:.1f} GB, and {host / 1e9:.1f} GB are free: {compared}; raise "
        "resources.memory to have the result loaded",
    )


def distance(a: Tensor, b: Tensor) -> float:
    """Returns the root mean square of a - b, relative to that of `b` about its mean for each token.

    Returns infinity if the shapes differ.
    """
    if a.shape != b.shape:
        return float("inf")
    spread = (b - b.mean(-1, keepdim=True)).pow(2).mean().sqrt()
    return float((a - b).pow(2).mean().sqrt() / spread.clamp_min(1e-12))


def _parts(result: WrittenResult, probe: Probe, device: torch.device) -> list[_Load]:
    folder, kind = result.folder, result.run.model.quantization
    if result.run.method == "full":
        dtype = export.stored_dtype(folder)
        parts = [_Load("model", "reload", partial(_model, folder, probe=probe), dtype)]
    else:
        parts = [_Load("adapter", "reload", partial(_adapted, result, device, probe=probe), probe.dtype, kind)]
    if result.run.merge:
        merged = folder / adapter_merge.FOLDER
        dtype = export.stored_dtype(merged)
        parts.append(_Load("merged model", "reloadMerged", partial(_model, merged, probe=probe), dtype))
    return parts


def _logits(model: Any, probe: Probe, device: torch.device) -> Tensor:
    inputs = {name: tensor.to(device) for name, tensor in probe.inputs.items()}
    with torch.no_grad(), torch.autocast(device.type, probe.autocast, enabled=probe.autocast is not None):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float().cpu()


def _adapted(
    result: WrittenResult, trained_on: torch.device, dtype: torch.dtype, probe: Probe, device: torch.device = _CPU
) -> Any:
    """Loads the adapter onto its base, which is quantized as in training and has rows for the added
    tokens. The base is quantized on the device that trained, wherever the result is kept, because
    another one may round differently."""
    from peft import PeftModel

    kind, added = result.run.model.quantization, result.run.added_tokens
    quantization = None if kind == "none" else Quantization(kind, trained_on, device)
    model = _model(result.base, dtype, probe, device, quantization)
    if added:
        added_tokens.resize_embeddings(model, tokenizer.ids(tokenizer.load(result.base, added), added))
    return PeftModel.from_pretrained(model, str(result.folder))


def _model(
    folder: Path,
    dtype: torch.dtype,
    probe: Probe,
    device: torch.device = _CPU,
    quantization: Quantization | None = None,
) -> Any:
    """Loads a model tensor by tensor onto the device, so that a GPU's model is never in the host's
    memory as a whole."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if probe.encoder_decoder else AutoModelForCausalLM
    placement = {} if device.type == "cpu" else {"device_map": {"": device}}
    options = quantization.options(dtype) if quantization else placement
    with quantization.computing() if quantization else nullcontext():
        model = auto.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
        )
    disable_repacking(model)
    return model


def _forget_deepspeed() -> None:
    """Keeps Transformers from partitioning the model that is loaded next.

    With zero3, it would partition this rank's second copy over ranks that don't load one.
    """
    if "deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _weight_bytes(base: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Returns the number of bytes that the base's weights occupy in memory, and that of the
    largest."""
    formats = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    tensors = adapter_merge.stored_tensors(base)
    sizes = [tensor.bytes // formats.get(tensor.format, 1) * dtype.itemsize for tensor in tensors]
    return sum(sizes), max(sizes, default=0)


def _free_gpu_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return free_bytes(device, 1)
