"""The shapes of the models in docs/sizing.md, from their published config.json files. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_QWEN = {"tie_word_embeddings": False, "vocab_size": 152064}
_SMALL_QWEN = {"tie_word_embeddings": True, "vocab_size": 151936}
_LLAMA = {"tie_word_embeddings": False, "vocab_size": 128256}


@dataclass(frozen=True, eq=False)
class PublishedModel:
    """Describes a published model whose layers are those of Llama, Mistral or Qwen2.

    `config` has the settings of its config.json that determine sizes. With `biases`, q, k and v
    have biases, as in Qwen2.
    """

    name: str
    config: Mapping[str, int]
    biases: bool = False


MODELS = (
    PublishedModel(
        "SmolLM2-135M",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    PublishedModel(
        "Qwen2.5-0.5B",
        {
            **_SMALL_QWEN,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        biases=True,
    ),
    PublishedModel(
        "Qwen2.5-1.5B",
        {
            **_SMALL_QWEN,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        biases=True,
    ),
    PublishedModel(
        "Llama-3.2-3B",
        {
            **_LLAMA,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    PublishedModel(
        "Mistral-7B-v0.3",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32768,
            "tie_word_embeddings": False,
        },
    ),
    PublishedModel(
        "Llama-3.1-8B",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    PublishedModel(
        "Qwen2.5-14B",
        {
            **_QWEN,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
        biases=True,
    ),
    PublishedModel(
        "Qwen2.5-32B",
        {
            **_QWEN,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
        biases=True,
    ),
    PublishedModel(
        "Llama-3.1-70B",
        {
            **_LLAMA,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
)


def tensor_shapes(model: PublishedModel) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors in the model's files by name, as their headers list them.

    The width of a head is the hidden size divided by the number of heads, which is right for all
    of `MODELS`.
    """
    config = model.config
    embedding = (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in _layer(model).items()}
    shapes["model.norm.weight"] = (config["hidden_size"],)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = embedding
    return shapes


def _layer(model: PublishedModel) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one layer's tensors by name."""
    config = model.config
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    key_width = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    widths = {"q_proj": hidden, "k_proj": key_width, "v_proj": key_width}
    biases = {f"self_attn.{name}.bias": (width,) for name, width in widths.items()} if model.biases else {}
    return {
        **{f"self_attn.{name}.weight": (width, hidden) for name, width in widths.items()},
        **biases,
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
