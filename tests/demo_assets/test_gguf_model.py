"""The demo's model is converted without PyTorch, with the same bytes as by Transformers."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from demo_assets import model
from demo_assets.gguf_model import interleaved_to_halves, parameter

# Of the files that Transformers 5.23.0 wrote after it had loaded the same GGUF.
_BY_TRANSFORMERS = {
    "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
    "tokenizer_config.json": "a368e8175f4ded8689293a6238e4d41b43e9688c5d2989d0f757ac7ad922ede5",
    "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
}


@pytest.mark.parametrize(("file", "digest"), _BY_TRANSFORMERS.items())
def test_a_converted_file_is_the_one_that_transformers_writes(file: str, digest: str) -> None:
    with (model.folder() / file).open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == digest


def test_the_configuration_is_that_of_smollm2() -> None:
    config = json.loads((model.folder() / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
    ],
)
def test_a_tensor_gets_its_name_in_transformers(tensor: str, name: str) -> None:
    assert parameter(tensor) == name


def test_the_rows_of_each_head_are_split_into_halves() -> None:
    rows = np.arange(8).reshape(8, 1)  # two heads of four rows: pairs (0, 1), (2, 3)
    assert interleaved_to_halves(rows, heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
