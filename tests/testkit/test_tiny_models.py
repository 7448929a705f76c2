"""The tiny models load with Transformers alone, can be trained, and are the same in every run."""

from __future__ import annotations

import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from testkit.tiny_models import BUILDERS, VOCABULARY, pickle_only, tiny_gpt2, tiny_llama

TEXT = "Define the noun: café ☕ — 42?\n\n  two spaces"


@pytest.mark.parametrize("family", BUILDERS)
def test_a_tiny_model_is_written_in_under_a_second(family: str, tmp_path: Path) -> None:
    BUILDERS[family](tmp_path / "imports its code")
    began = time.monotonic()
    BUILDERS[family](tmp_path / "timed")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("family", BUILDERS)
def test_a_tiny_model_loads_and_gives_a_finite_loss(family: str, tmp_path: Path) -> None:
    folder = BUILDERS[family](tmp_path)
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    assert list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", BUILDERS)
def test_the_tokenizer_decodes_any_text_that_it_encoded(family: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILDERS[family](tmp_path))
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < len(tokenizer) <= VOCABULARY
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_the_chat_template_makes_the_prompt_a_prefix_of_the_conversation(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama(tmp_path))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    conversation = tokenizer.apply_chat_template(turns, tokenize=False)
    assert conversation == prompt + "Hello.<|im_end|>\n"
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_model_without_a_chat_template_has_none(tmp_path: Path) -> None:
    assert AutoTokenizer.from_pretrained(tiny_gpt2(tmp_path)).chat_template is None


def test_the_same_seed_writes_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        folder = tiny_llama(tmp_path / name, seed=seed)
        return sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    assert digest("one", 1) == digest("again", 1) != digest("two", 2)


def test_building_a_model_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    tiny_llama(tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_the_pickle_folder_contains_no_safetensors(tmp_path: Path) -> None:
    folder = pickle_only(tmp_path)
    assert (folder / "pytorch_model.bin").exists()
    assert not list(folder.glob("*.safetensors"))
