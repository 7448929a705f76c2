"""The demo's model is the real one: it answers, it stops, and it is saved as any model of the hub is."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_assets import model


def test_the_model_knows_the_capital_of_france_and_stops() -> None:
    folder = model.folder()
    words = AutoTokenizer.from_pretrained(folder)
    answerer = AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = words.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = words(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        answer = answerer.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert words.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_configuration_names_no_quantization_and_no_place_of_its_making() -> None:
    folder = model.folder()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert str(folder.parent) not in "".join(file.read_text() for file in folder.glob("*.json"))
