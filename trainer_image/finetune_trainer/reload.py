"""The check before "saved": what was written, loaded again as a user would, gives the training process's logits.

`probe` is taken by all ranks together, `check` is rank 0's. Called by `story`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_api.run import RunConfig
from finetune_trainer import export, merge, tokenizer_files, vocabulary
from finetune_trainer.failure import Failed
from finetune_trainer.free_memory import free_bytes, give_back
from finetune_trainer.model import Quantized, keep_packed
from finetune_trainer.reporter import Reporter
from finetune_trainer.train import Training

_TOKENS = 64
_CANDIDATES = 32
# Of the logits' own size. Other kernels sum in another order; half precision rounds to 2^-8 at every layer.
TOLERANCE = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_ROOM = 1.3  # times the weights, to load and use a model


@dataclass(frozen=True)
class Probe:
    """A beginning of one training example, and what the trained model says to it. All on the CPU."""

    inputs: dict[str, Tensor]
    logits: Tensor
    dtype: torch.dtype  # of the base's weights in memory
    autocast: torch.dtype | None
    encoder_decoder: bool


def probe(t: Training) -> Probe:
    """Every rank computes the same."""
    lengths = t.train.lengths[:_CANDIDATES]
    collate = replace(t.collate, packed=False, shared=False)
    batch = collate(t.train, (int(lengths.argmax()),))
    cut = {name: tensor[:, :_TOKENS].contiguous() for name, tensor in batch.inputs.items()}
    logits = t.evaluator.logits(cut)
    half = t.loss_sum.autocast
    stored = torch.float32 if half is None or t.run.method == "full" else half
    inputs = {name: tensor.cpu() for name, tensor in cut.items()}
    return Probe(inputs, logits, stored, half, t.collate.encoder_decoder)


def check(folder: Path, run: RunConfig, base: Path, seen: Probe, reporter: Reporter, device: torch.device) -> None:
    """Raises Failed(ResultMismatch)."""
    _load_whole()
    todo: list[tuple[str, Callable[[torch.dtype], Any], torch.dtype]] = []
    if run.method == "full":
        stored = export.stored_dtype(folder)
        todo.append(("model", lambda dtype: _model(folder, dtype, seen), stored))
    else:
        todo.append(("adapter", lambda dtype: _adapted(run, base, folder, dtype, seen), seen.dtype))
    if run.merge:
        merged = folder / merge.FOLDER
        todo.append(("merged model", lambda dtype: _model(merged, dtype, seen), export.stored_dtype(merged)))
    for what, load, dtype in todo:
        give_back()
        topic = "reload" if what != "merged model" else "reloadMerged"
        place, reason = where(_bytes(base, dtype), free_bytes(torch.device("cpu"), 1), _gpu_bytes(device))
        if place == "nowhere":
            reporter.decision(topic, "not loaded", reason)
            continue
        reporter.alive()
        there = device if place == "gpu" else torch.device("cpu")
        model = load(dtype).to(there).eval()
        coarse = max((dtype, seen.dtype, seen.autocast or seen.dtype), key=lambda d: TOLERANCE[d])
        off = distance(_logits(model, seen, there), seen.logits)
        del model
        gc.collect()
        tokens = seen.logits.shape[-2]
        if not off <= TOLERANCE[coarse]:
            raise Failed(
                "ResultMismatch",
                f"the written {what}, loaded again, differs from the trained one: its logits for {tokens} tokens are "
                f"off by {off:.2g} of their size, where {TOLERANCE[coarse]:.0e} is rounding",
            )
        reporter.decision(
            topic, "equal", f"the written {what} gives the trained logits of {tokens} tokens to {off:.1e} ({reason})"
        )


def where(needed: int, host: int, gpu: int) -> tuple[str, str]:
    """(gpu, cpu or nowhere; the reason), by what is free in bytes. Pure."""
    need = int(needed * _ROOM)
    if gpu >= need:
        return "gpu", f"loaded beside the trained one: {need / 1e9:.1f} GB of {gpu / 1e9:.1f} free"
    if host >= need:
        return "cpu", f"loaded in the host's memory: {need / 1e9:.1f} GB of {host / 1e9:.1f} free"
    return (
        "nowhere",
        f"a second copy needs {need / 1e9:.1f} GB and {host / 1e9:.1f} are free: only the files' own values were "
        "compared; raise resources.memory to have the result loaded",
    )


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, against that of the logits about their mean."""
    if a.shape != b.shape:
        return float("inf")
    spread = (b - b.mean(-1, keepdim=True)).pow(2).mean().sqrt()
    return float((a - b).pow(2).mean().sqrt() / spread.clamp_min(1e-12))


def _logits(model: Any, seen: Probe, device: torch.device) -> Tensor:
    inputs = {name: tensor.to(device) for name, tensor in seen.inputs.items()}
    with torch.no_grad(), torch.autocast(device.type, seen.autocast, enabled=seen.autocast is not None):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float().cpu()


def _adapted(run: RunConfig, base: Path, adapter: Path, dtype: torch.dtype, seen: Probe) -> Any:
    """On a base that is quantised as it was in training, and has rows for the tokens that were added."""
    from peft import PeftModel

    kind = run.model.quantization
    few = None if kind == "none" else Quantized(kind, torch.device("cpu"))
    model = _model(base, dtype, seen, few)
    if run.added_tokens:
        tokenizer = tokenizer_files.load(base, run.added_tokens)
        vocabulary.grow(model, vocabulary.ids(tokenizer, run.added_tokens))
    return PeftModel.from_pretrained(model, str(adapter))


def _model(folder: Path, dtype: torch.dtype, seen: Probe, quantized: Quantized | None = None) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if seen.encoder_decoder else AutoModelForCausalLM
    few = quantized.options(dtype) if quantized else {}
    model = auto.from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, **few
    )
    keep_packed(model)
    return model


def _load_whole() -> None:
    """Under zero3 Transformers would split this rank's second copy over ranks that don't load one."""
    if "deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _bytes(base: Path, dtype: torch.dtype) -> int:
    formats = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    return sum(tensor.bytes // formats.get(tensor.format, 1) * dtype.itemsize for tensor in merge.stored(base))


def _gpu_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return free_bytes(device, 1)
