"""Handles tokens that a job adds to the vocabulary: rows of the embeddings and of the output layer.

Only these rows are trained. PEFT calls them trainable_token_indices, and it saves only these rows.
torch is imported only in `resize_embeddings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def resize_embeddings(base: Any, token_ids: Sequence[int]) -> None:
    """Gives the model a row for each token. New rows start as the mean of the existing ones, so
    they are equal on every rank."""
    import torch

    from finetune_trainer.model import partitioned

    existing = int(base.get_input_embeddings().num_embeddings)
    if not token_ids or max(token_ids) < existing:
        return
    base.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            if layer is None:
                continue
            with partitioned.gathered(layer.weight):
                if layer.weight.numel():
                    layer.weight[existing:] = layer.weight[:existing].mean(0, keepdim=True)
                if getattr(layer, "bias", None) is not None:
                    layer.bias[existing:] = layer.bias[:existing].mean()


def rows(base: Any, token_ids: Sequence[int]) -> dict[str, list[int]] | None:
    """Returns PEFT's trainable_token_indices, or None if there are no tokens. PEFT keeps a tied
    output layer equal to the embeddings."""
    if not token_ids:
        return None
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    tied = outputs is None or outputs.weight is inputs.weight
    return {
        name: list(token_ids)
        for name, module in base.named_modules()
        if module is inputs or (module is outputs and not tied)
    }
