"""Converts a Llama model in GGUF into the folder that Transformers loads, without PyTorch.

The weights become float32 and are bit-identical to those that Transformers writes after it has
loaded the same file. Only what SmolLM2 needs is supported: Llama with tied embeddings and a
byte-level BPE tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL = 3  # the type of a special token in GGUF


def convert(file: Path, target: Path) -> None:
    """Writes config, weights, tokenizer and chat template of the model in `file` to `target`.

    Raises ValueError if it is another architecture or tokenizer.
    """
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (fields["general.architecture"], fields["tokenizer.ggml.model"]) != ("llama", "gpt2"):
        raise ValueError(f"{file.name}: only Llama with a byte-level BPE tokenizer can be converted")
    config = configuration(fields)
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", _generation(config))
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(_part(tensor.name))
        weights[parameter(tensor.name)] = np.ascontiguousarray(
            interleaved_to_halves(values, config[heads]) if heads else values
        )
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(fields, target)


def parameter(tensor: str) -> str:
    """Returns the name in Transformers of a tensor of the file."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if tensor in names:
        return names[tensor]
    _, layer, part, kind = tensor.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.{kind}"


def interleaved_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key weight (heads * size, hidden) of each head.

    GGUF interleaves the two halves that rotary embeddings rotate: row 2i and row 2i + 1 are a
    pair. In Transformers, rows i and i + size/2 are.
    """
    size = weight.shape[0] // heads
    return weight.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def configuration(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of config.json from the file's metadata."""
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": fields["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": True,
        "unk_token_id": fields["tokenizer.ggml.unknown_token_id"],
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _generation(config: dict[str, Any]) -> dict[str, Any]:
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True, **ids, "use_cache": True}


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    """Writes tokenizer.json, its configuration and the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    settings = {f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": fields["llama.context_length"]}
    _write_json(target / "tokenizer_config.json", settings)
    (target / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])


def _part(tensor: str) -> str:
    parts = tensor.split(".")
    return parts[2] if parts[0] == "blk" else ""


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
