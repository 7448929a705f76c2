"""Prepares the loaded model for training as spec.method specifies."""

from __future__ import annotations

import torch

from finetune_api.messages.run import RunConfig
from finetune_trainer import seeds
from finetune_trainer.data import tokenizer
from finetune_trainer.data.dataset import Data
from finetune_trainer.model import added_tokens, experts, freezing, loading, lora, quantization
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.partitioned import shape_of
from finetune_trainer.model.quantization import Quantization
from finetune_trainer.reporting.event_writer import EventWriter


def quantized(run: RunConfig, device: torch.device, dtype: torch.dtype, reporter: EventWriter) -> Quantization | None:
    """Returns how the base is quantized and logs it, or returns None if it isn't quantized. `dtype`
    is that of the weights that aren't quantized."""
    kind = run.model.quantization
    if kind == "none":
        return None
    reason = "set by model.quantization; embeddings, norms and the output layer stay as they are"
    warning = quantization.warning(kind, device.type, dtype)
    reporter.decision("quantization", kind, f"{reason}; {warning}" if warning else reason)
    # A sharded base may be too large for one device, so rank 0 reads it into the host's memory.
    sharded = run.world.strategy == "fsdp"
    return Quantization(kind, device, torch.device("cpu") if sharded else None)


def apply(run: RunConfig, loaded: LoadedModel, data: Data, reporter: EventWriter) -> LoadedModel:
    """Adds adapters to the frozen base, or makes the base's own weights trainable. Logs how many
    parameters are trained.

    Raises RunError if a token has no embedding, or if a configured name doesn't exist in the model.
    """
    token_ids = tokenizer.ids(data.renderer.tokenizer, run.added_tokens)
    added_tokens.resize_embeddings(loaded.base, token_ids)
    loading.check_tokens(loaded, data.highest)
    if run.lora is None:
        loaded = freezing.unfreeze(loaded, run.full)
    else:
        loaded = lora.adapt(loaded, run.lora, seeds.mix(run.training.seed, "lora"), token_ids)
        _report_experts(loaded, reporter)
    trainable, parameters = loaded.trainable, loaded.parameters
    reason = f"{trainable} of {parameters} parameters are trained"
    reporter.decision("trainable", f"{trainable / parameters:.3%}", reason)
    return loaded


def _report_experts(loaded: LoadedModel, reporter: EventWriter) -> None:
    """Reports which weights of a mixture of experts no adapter changes."""
    mixture, adapted = experts.find(loaded.base), lora.adapted_layers(loaded.model)
    trained = (p for p in loaded.base.parameters() if p.requires_grad)
    if mixture.parameters and not any(len(shape_of(p)) == 3 for p in trained):
        reporter.decision("experts", "not adapted", mixture.warning(adapted))
    routers = [name for name in mixture.routers if name not in adapted]
    if routers:
        reporter.decision("routers", "not adapted", f"{', '.join(routers)} must be named in method.lora.targetModules")
