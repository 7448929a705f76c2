"""The shapes of models with Llama's layers, and the methods that train them: Llama with 1B and 8B
weights, Llama 2 with as many key heads as query heads, Qwen 2.5 with a small hidden size, and Gemma
2 and 3 with large vocabularies and wide heads."""

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
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "256k": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
    "262k, untied": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "tie_word_embeddings": False,
    },
}
METHODS = {
    "q and v": LoraSpec(rank=16, target_modules=("q_proj", "v_proj"), dropout=0.05),
    "all-linear": LoraSpec(rank=16, target_modules=("all-linear",), dropout=0.05),
    "no dropout": LoraSpec(rank=16, target_modules=("all-linear",), dropout=0.0),
    "high rank": LoraSpec(rank=128, target_modules=("all-linear",), dropout=0.05),
    "trained embeddings": LoraSpec(target_modules=("q_proj", "v_proj"), dropout=0.0, modules_to_save=("embed_tokens",)),
    "trained head": LoraSpec(target_modules=("q_proj", "v_proj"), dropout=0.0, modules_to_save=("lm_head",)),
    "trained head and embeddings": LoraSpec(
        target_modules=("all-linear",), dropout=0.0, modules_to_save=("lm_head", "embed_tokens")
    ),
    "full": None,
}
