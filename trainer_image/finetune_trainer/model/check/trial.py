"""Builds a model as the ranks do, but on PyTorch's meta device: tensors have shapes and no data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune_api.messages.run import RunConfig
from finetune_trainer import refusals
from finetune_trainer.data import pipeline
from finetune_trainer.model import loading, method
from finetune_trainer.model.check import shared_rows
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.quantization import Quantization, refusing_wide_inputs
from finetune_trainer.model_folder import Capacity, RowNeeds

_TOKENS = 8
_TOPICS = ("experts", "routers", "trainable")
_AS_PUBLISHED = "compare config.json with the one that was published"


def build(run: RunConfig, folder: Path, decisions: list[str]) -> Capacity:
    """Builds the model of `folder` from its configuration and the headers of its weights, applies
    the method, and calls it. Appends what was decided to `decisions`.

    Returns what the rows must fit into. Raises RunError for what the ranks would refuse.
    """
    loading.check(folder)
    tokenizer = pipeline.load_renderer(folder, run.data, run.added_tokens).tokenizer
    dtype = torch.bfloat16  # nothing depends on it, but products of experts have no shapes in other formats
    loaded = loading.load(folder, dtype=dtype, longest=0, headers_only=True)
    shared_rows.check(loaded.base.config, run.world.sequence_parallel_size, loaded.packing_obstacle)
    with refusing_wide_inputs(loaded.base, run.model.quantization):
        call(loaded)
    if run.model.quantization != "none":
        quantized = Quantization(run.model.quantization, torch.device("cpu"))
        loading.load(folder, dtype=dtype, longest=0, outline=True, quantized=quantized)
        loaded = replace(loaded, quantized=True)  # a quantized base without data can't be adapted in every way
    loaded = method.apply(run, folder, loaded, tokenizer, RowNeeds(), _Lines(decisions))
    return method.capacity(loaded)


def call(loaded: LoadedModel) -> None:
    """Computes a few tokens without data, so that shapes and settings meet.

    Raises RunError(ModelInvalid) for a configuration that can't be computed with.
    """
    model = loaded.base
    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    if loaded.encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    attention = model.config._attn_implementation
    with refusals.raising("ModelInvalid", "model.uri: the model can't compute a text", _AS_PUBLISHED), torch.no_grad():
        model.set_attn_implementation("eager")  # the others look into masks, which have no data here
        try:
            model(**inputs)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
        finally:
            model.set_attn_implementation(attention)


class _Lines:
    """Keeps some of the decisions as lines for a log."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def decision(self, topic: str, choice: str, reason: str) -> None:
        """Keeps a decision if it depends only on the model."""
        if topic in _TOPICS:
            self._lines.append(f"{topic}: {choice} ({reason})")
