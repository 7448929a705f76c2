"""Tiny random models with a real tokenizer, written to a folder in well under a second, for tests.

Every builder is deterministic (seed) and returns the folder that it wrote. Nothing is read from the
network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 300
MAX_POSITIONS = 512
# The last one is there because Qwen2's own tokenizer class adds it if it is missing.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
PAD, BOS, EOS, TURN_START, TURN_END = SPECIAL_TOKENS[:5]

# ChatML, as SmolLM2 and Qwen2 have it: every turn ends with the end-of-turn token and a line break.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = (
    "Define the noun: lighthouse. A tower with a light that gives warning of shoals to passing ships.",
    "Define the verb: wander. Move about aimlessly or without any destination.",
    "system user assistant\nThe quick brown fox jumps over the lazy dog, again and again.",
    "0123456789 + - * / = ( ) [ ] { } < > ? ! ; : ' \" & % $ # @ _ ~ | \\",
)


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained here on a few sentences: any text is encoded and
    decoded unchanged.

    The stop token is the end of a turn if there is a chat template, otherwise "</s>".
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=TURN_END if chat else EOS,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(
    folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32, tied: bool = True, chat: bool = True
) -> Path:
    """Decoder-only model with grouped-query attention and a chat template: SmolLM2's shape, 5,000
    times smaller."""
    config = LlamaConfig(**_sizes(hidden, layers), num_key_value_heads=2, tie_word_embeddings=tied, **_token_ids(chat))
    return _save(folder, LlamaForCausalLM, config, tokenizer(chat), seed)


def tiny_llama3(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """Llama 3.1's shape: scaled rotary frequencies, an untied output head, several stop tokens."""
    scaled = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    ids = {**_token_ids(chat=True), "eos_token_id": [SPECIAL_TOKENS.index(TURN_END), SPECIAL_TOKENS.index(EOS)]}
    config = LlamaConfig(
        **_sizes(hidden, layers), num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=scaled, **ids
    )
    return _save(folder, LlamaForCausalLM, config, tokenizer(), seed)


def tiny_qwen2(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32, window: int | None = None) -> Path:
    """Decoder-only model with biases on q, k and v and an untied output head, and with `window` a
    sliding window in all layers except the first."""
    config = Qwen2Config(
        **_sizes(hidden, layers), num_key_value_heads=2, tie_word_embeddings=False, use_sliding_window=bool(window),
        sliding_window=window, max_window_layers=1, **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, Qwen2ForCausalLM, config, tokenizer(), seed)


def tiny_qwen3(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """Model with norms of queries and keys, heads wider than the hidden size implies, and tied
    embeddings."""
    config = Qwen3Config(
        **_sizes(hidden, layers), num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **_token_ids(chat=True)
    )
    return _save(folder, Qwen3ForCausalLM, config, tokenizer(), seed)


def tiny_gpt2(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """Decoder-only model with Conv1D projections (`c_attn`), trained positions, and no chat
    template."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        n_positions=MAX_POSITIONS,
        **_token_ids(chat=False),
    )
    return _save(folder, GPT2LMHeadModel, config, tokenizer(chat=False), seed)


def tiny_t5(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32, flan: bool = False) -> Path:
    """Encoder-decoder model whose projections are called `q` and `v`, and whose own loss is a mean.

    `flan`: the shape of T5 1.1 and Flan-T5, with a gated product and an untied output head.
    """
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=hidden,
        d_kv=hidden // 4,
        d_ff=2 * hidden,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu" if flan else "relu",
        tie_word_embeddings=not flan,
        decoder_start_token_id=SPECIAL_TOKENS.index(PAD),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    return _save(folder, T5ForConditionalGeneration, config, tokenizer(chat=False), seed)


def tiny_mistral(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32, window: int | None = None) -> Path:
    """Llama's shape with a sliding window in every layer, or without one."""
    config = MistralConfig(
        **_sizes(hidden, layers), num_key_value_heads=2, sliding_window=window, **_token_ids(chat=True)
    )
    return _save(folder, MistralForCausalLM, config, tokenizer(), seed)


def tiny_phi3(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32, window: int | None = None) -> Path:
    """Model with q, k and v in one projection, and gate and up in another."""
    config = Phi3Config(**_sizes(hidden, layers), num_key_value_heads=2, sliding_window=window, **_token_ids(chat=True))
    return _save(folder, Phi3ForCausalLM, config, tokenizer(), seed)


def tiny_gemma3(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32, window: int = 8) -> Path:
    """Model with a sliding window in every other layer, norms of queries and keys, and scaled
    embeddings."""
    kinds = ["sliding_attention", "full_attention"] * layers
    config = Gemma3TextConfig(
        **_sizes(hidden, layers), num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=window,
        layer_types=kinds[:layers], **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, Gemma3ForCausalLM, config, tokenizer(), seed)


def tiny_gemma(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """Model with scaled embeddings that are also the output layer, and norms whose weights are
    offset by one."""
    config = GemmaConfig(**_sizes(hidden, layers), num_key_value_heads=1, head_dim=8, **_token_ids(chat=True))
    return _save(folder, GemmaForCausalLM, config, tokenizer(), seed)


def tiny_gemma2(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32, window: int = 4096) -> Path:
    """Model with attention scores and logits that are soft-capped by a tanh, and a sliding window
    in every other layer."""
    config = Gemma2Config(
        **_sizes(hidden, layers), num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=window,
        **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, Gemma2ForCausalLM, config, tokenizer(), seed)


def tiny_gpt_oss(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32, window: int = 16) -> Path:
    """Model with attention sinks, a sliding window in every other layer, and a mixture of
    experts."""
    config = GptOssConfig(
        **_sizes(hidden, layers), num_key_value_heads=2, head_dim=8, sliding_window=window, num_local_experts=4,
        num_experts_per_tok=2, **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, GptOssForCausalLM, config, tokenizer(), seed)


def tiny_mixtral(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """Mixture of experts in every layer."""
    config = MixtralConfig(
        **_sizes(hidden, layers), num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, MixtralForCausalLM, config, tokenizer(), seed)


def tiny_qwen2_moe(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """Mixture of experts beside an expert that every token uses, whose weight is a linear layer."""
    config = Qwen2MoeConfig(
        **_sizes(hidden, layers), num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=hidden, shared_expert_intermediate_size=2 * hidden, **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, Qwen2MoeForCausalLM, config, tokenizer(), seed)


def tiny_qwen3_moe(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """Mixture of experts with norms of queries and keys."""
    config = Qwen3MoeConfig(
        **_sizes(hidden, layers), num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
        moe_intermediate_size=hidden, **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, Qwen3MoeForCausalLM, config, tokenizer(), seed)


def tiny_flan_t5(folder: Path, *, seed: int = 0) -> Path:
    return tiny_t5(folder, seed=seed, flan=True)


def pickle_only(folder: Path, *, seed: int = 0) -> Path:
    """Model whose weights exist only as `pytorch_model.bin`; it must be refused, since loading it
    runs code."""
    tiny_llama(folder, seed=seed)
    weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "t5": tiny_t5,
}


def _sizes(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
    }


def _token_ids(chat: bool) -> dict[str, Any]:
    return {
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(TURN_END if chat else EOS),
    }


def _save(
    folder: Path, model: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = model(config)
    folder.mkdir(parents=True, exist_ok=True)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
