"""Tiny random models of families that are built in a special way, and of some that can't be trained
on text, as in `tiny_models`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from testkit.tiny_models import VOCABULARY, _save, _sizes, _token_ids, tokenizer

_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_HIDDEN, _LAYERS = 32, 2


def tiny_falcon(folder: Path, *, seed: int = 0) -> Path:
    """Model that chooses among attention classes of its own, with q, k and v in one projection."""
    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=_HIDDEN, num_hidden_layers=_LAYERS, num_attention_heads=4,
        new_decoder_architecture=True, num_kv_heads=2, **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, FalconForCausalLM, config, tokenizer(), seed)


def tiny_gemma3_multimodal(folder: Path, *, seed: int = 0, window: int = 8) -> Path:
    """Gemma 3 beside a vision tower whose layers have the same names; its settings are nested."""
    config = Gemma3Config(
        text_config={
            **_sizes(_HIDDEN, _LAYERS), "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8,
            "sliding_window": window, "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**_VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=7, boi_token_index=8, eoi_token_index=9, **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, Gemma3ForConditionalGeneration, config, tokenizer(), seed)


def tiny_olmoe(folder: Path, *, seed: int = 0) -> Path:
    """Mixture of experts with norms over all heads of queries and keys."""
    config = OlmoeConfig(
        **_sizes(_HIDDEN, _LAYERS), num_key_value_heads=4, num_experts=4, num_experts_per_tok=2,
        **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, OlmoeForCausalLM, config, tokenizer(), seed)


def tiny_deepseek_v3(folder: Path, *, seed: int = 0) -> Path:
    """Mixture of experts after a dense layer, with compressed queries, keys and values."""
    config = DeepseekV3Config(
        **_sizes(_HIDDEN, _LAYERS), num_key_value_heads=4, moe_intermediate_size=_HIDDEN, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, DeepseekV3ForCausalLM, config, tokenizer(), seed)


def tiny_bart(folder: Path, *, seed: int = 0, positions: int = 40) -> Path:
    """Encoder-decoder with as few trained positions as `positions`."""
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=_HIDDEN, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=positions,
        decoder_start_token_id=2, **_token_ids(chat=False),
    )  # fmt: skip
    return _save(folder, BartForConditionalGeneration, config, tokenizer(chat=False), seed)


def tiny_mamba(folder: Path, *, seed: int = 0) -> Path:
    """Model whose layers carry state from token to token, some of which PEFT refuses to adapt."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=_HIDDEN, num_hidden_layers=_LAYERS, state_size=4, **_token_ids(chat=True)
    )
    return _save(folder, MambaForCausalLM, config, tokenizer(), seed)


def tiny_bert(folder: Path, *, seed: int = 0) -> Path:
    """Encoder that Transformers loads as a language model."""
    return _save(folder, BertLMHeadModel, BertConfig(**_sizes(_HIDDEN, _LAYERS)), tokenizer(chat=False), seed)


def tiny_modernbert(folder: Path, *, seed: int = 0) -> Path:
    """Encoder that Transformers doesn't load as a language model."""
    ids = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1)
    config = ModernBertConfig(**_sizes(_HIDDEN, _LAYERS), **ids)
    return _save(folder, ModernBertForMaskedLM, config, tokenizer(chat=False), seed)


def tiny_embedding_gemma(folder: Path, *, seed: int = 0) -> Path:
    """Gemma 3 whose tokens also see those that follow."""
    config = Gemma3TextConfig(
        **_sizes(_HIDDEN, _LAYERS), num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True,
        **_token_ids(chat=True),
    )  # fmt: skip
    return _save(folder, Gemma3ForCausalLM, config, tokenizer(), seed)


def tiny_mistral3(folder: Path, *, seed: int = 0) -> Path:
    """Model of images and text without a class for text alone."""
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_sizes(_HIDDEN, _LAYERS), "num_key_value_heads": 2},
        vision_config={**_VISION, "model_type": "pixtral"},
    )
    return _save(folder, Mistral3ForConditionalGeneration, config, tokenizer(), seed)


TRAINABLE: dict[str, Callable[[Path], Path]] = {
    "falcon": tiny_falcon,
    "gemma3 with images": tiny_gemma3_multimodal,
    "olmoe": tiny_olmoe,
    "deepseek-v3": tiny_deepseek_v3,
    "bart": tiny_bart,
}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "bert": (tiny_bert, "a bert model is an encoder"),
    "modernbert": (tiny_modernbert, "a modernbert model is an encoder"),
    "embeddinggemma": (tiny_embedding_gemma, "a gemma3_text model is an encoder"),
    "mistral3": (tiny_mistral3, "a mistral3 model reads images too"),
}
