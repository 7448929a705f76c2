"""What of the loaded model learns, as spec.method says. Called by `assembly` on every rank alike."""

from __future__ import annotations

import torch

from finetune_api.run import RunConfig
from finetune_trainer import adapters, freezing, model, seeds, vocabulary
from finetune_trainer.data import Data
from finetune_trainer.model import Loaded, Quantized
from finetune_trainer.reporter import Reporter


def quantized(run: RunConfig, device: torch.device, reporter: Reporter) -> Quantized | None:
    """How the base is kept in few bits, where it is."""
    kind = run.model.quantization
    if kind == "none":
        return None
    reporter.decision("quantization", kind, "model.quantization says so; embeddings, norms and the output layer aren't")
    return Quantized(kind, device)


def apply(run: RunConfig, loaded: Loaded, data: Data, reporter: Reporter) -> Loaded:
    """Adapters beside a frozen base, or weights that learn themselves. Raises Failed for names that it lacks."""
    learnt = vocabulary.ids(data.renderer.tokenizer, run.added_tokens)
    vocabulary.grow(loaded.base, learnt)
    model.check_tokens(loaded, data.highest)
    if run.lora is None:
        loaded = freezing.unfreeze(loaded, run.full)
    else:
        loaded = adapters.adapt(loaded, run.lora, seeds.mix(run.training.seed, "lora"), learnt)
    trainable, parameters = loaded.trainable, loaded.parameters
    reporter.decision("trainable", f"{trainable / parameters:.3%}", f"{trainable} of {parameters} parameters learn")
    return loaded
