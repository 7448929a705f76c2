"""Tokens that a job adds: in the tokenizer, and as rows of the embeddings and the output layer. No torch until `grow`.

Called by `render` (the tokenizer), `assembly` (the model) and `export`. Only the added tokens' rows learn; PEFT calls
that trainable_token_indices and writes those rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Those that it has already stay what they are."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


def ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    return tuple(sorted({int(number) for number in tokenizer.convert_tokens_to_ids(list(tokens))}))


def grow(base: Any, learnt: Sequence[int]) -> None:
    """The model has a row for each; new rows begin as the mean of the others, on every rank alike."""
    import torch

    from finetune_trainer import zero_config

    before = int(base.get_input_embeddings().num_embeddings)
    if not learnt or max(learnt) < before:
        return
    base.resize_token_embeddings(max(learnt) + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            if layer is None:
                continue
            with zero_config.whole(layer.weight):
                if layer.weight.numel():
                    layer.weight[before:] = layer.weight[:before].mean(0, keepdim=True)
                if getattr(layer, "bias", None) is not None:
                    layer.bias[before:] = layer.bias[:before].mean()


def rows(base: Any, learnt: Sequence[int]) -> dict[str, list[int]] | None:
    """PEFT's trainable_token_indices. A tied output layer follows the embeddings by itself."""
    if not learnt:
        return None
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    tied = outputs is None or outputs.weight is inputs.weight
    return {
        name: list(learnt)
        for name, module in base.named_modules()
        if module is inputs or (module is outputs and not tied)
    }
