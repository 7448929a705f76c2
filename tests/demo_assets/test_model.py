"""The demo's model is the real one: it answers and stops, and it is saved like any model of the
hub."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_assets import model


def test_the_model_knows_the_capital_of_france_and_stops() -> None:
    folder = model.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answerer = AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        answer = answerer.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_configuration_names_no_quantization_and_no_path_of_the_machine_that_made_it() -> None:
    folder = model.folder()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert str(folder.parent) not in "".join(file.read_text() for file in folder.glob("*.json"))
