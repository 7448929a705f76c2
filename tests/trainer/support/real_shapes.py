"""The shapes of Llama models with 1B and 8B weights, and the methods that train them."""

from __future__ import annotations

from typing import Any

from finetune_api.resource import LoraSpec

MODELS: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
METHODS = {
    "q and v": LoraSpec(rank=16, target_modules=("q_proj", "v_proj"), dropout=0.05),
    "all-linear": LoraSpec(rank=16, target_modules=("all-linear",), dropout=0.05),
    "no dropout": LoraSpec(rank=16, target_modules=("all-linear",), dropout=0.0),
    "full": None,
}
