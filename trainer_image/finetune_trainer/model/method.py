"""Prepares the loaded model for training as spec.method specifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from finetune_api.messages.run import RunConfig
from finetune_trainer import model_folder, refusals, seeds
from finetune_trainer.data import tokenizer as tokenizers
from finetune_trainer.model import added_tokens, experts, families, freezing, lora, quantization
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.partitioned import shape_of
from finetune_trainer.model.quantization import Quantization
from finetune_trainer.model.result import adapter_merge
from finetune_trainer.model_folder import RowNeeds


def quantized(run: RunConfig, device: torch.device, dtype: torch.dtype, reporter: Decisions) -> Quantization | None:
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


class Decisions(Protocol):
    """Receives automatic choices; `reporting.event_writer.EventWriter` is one."""

    def decision(self, topic: str, choice: str, reason: str) -> None:
        """Receives a choice and its reason."""
        ...


def apply(
    run: RunConfig, folder: Path, loaded: LoadedModel, tokenizer: Any, rows: RowNeeds, reporter: Decisions
) -> LoadedModel:
    """Adds adapters to the frozen base, or makes the base's own weights trainable. Logs how many
    parameters are trained.

    `folder` is that of the base. Raises RunError if a token has no embedding or position, if a
    configured name doesn't exist in the model, or if the result couldn't be merged.
    """
    token_ids = tokenizers.ids(tokenizer, run.added_tokens)
    with refusals.raising("InvalidConfig", "method.lora.addedTokens: the embeddings can't grow", "remove the tokens"):
        added_tokens.resize_embeddings(loaded.base, token_ids)
    model_folder.check_rows(capacity(loaded), rows)
    if run.lora is None:
        loaded = freezing.unfreeze(loaded, run.full)
    else:
        loaded = lora.adapt(loaded, run.lora, seeds.mix(run.training.seed, "lora"), token_ids)
        _report_experts(loaded, reporter)
    trainable, parameters = loaded.trainable, loaded.parameters
    reason = f"{trainable} of {parameters} parameters are trained"
    reporter.decision("trainable", f"{trainable / parameters:.3%}", reason)
    if run.merge:
        adapter_merge.check(folder, (name for name, p in loaded.model.named_parameters() if p.requires_grad))
    return loaded


def capacity(loaded: LoadedModel) -> model_folder.Capacity:
    """Returns how many token ids and positions a model has."""
    sources, rest = families.position_limits(loaded.base.config)
    embeddings = loaded.base.get_input_embeddings()
    rows = getattr(embeddings, "original_module", embeddings).num_embeddings  # of PEFT's wrapper if it is trained
    return model_folder.Capacity(int(rows), sources, rest)


def _report_experts(loaded: LoadedModel, reporter: Decisions) -> None:
    """Reports which weights of a mixture of experts no adapter changes."""
    mixture, adapted = experts.find(loaded.base), lora.adapted_layers(loaded.model)
    trained = (p for p in loaded.base.parameters() if p.requires_grad)
    if mixture.parameters and not any(len(shape_of(p)) == 3 for p in trained):
        reporter.decision("experts", "not adapted", mixture.warning(adapted, quantized=loaded.quantized))
    routers = [name for name in mixture.routers if name not in adapted]
    if routers:
        reporter.decision("routers", "not adapted", f"{', '.join(routers)} must be named in method.lora.targetModules")
