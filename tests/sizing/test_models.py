"""The models of docs/sizing.md have the shapes and the numbers of weights of the published ones."""

from __future__ import annotations

import math

import pytest

from sizing.fits import METHODS, size_of
from sizing.models import MODELS, tensor_shapes

_BY_NAME = {model.name: model for model in MODELS}
_LORA, _QLORA, _FULL = METHODS
_WEIGHTS = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
}


def test_every_model_is_checked_and_they_are_in_order_of_size() -> None:
    assert list(_BY_NAME) == list(_WEIGHTS)
    assert list(_WEIGHTS.values()) == sorted(_WEIGHTS.values())


@pytest.mark.parametrize(("name", "weights"), _WEIGHTS.items())
def test_a_model_has_as_many_weights_as_its_published_files(name: str, weights: int) -> None:
    model = _BY_NAME[name]
    assert sum(math.prod(shape) for shape in tensor_shapes(model).values()) == weights
    size = size_of(model, _FULL)
    assert size.parameters == size.trained == weights
    assert size.layers == model.config["num_hidden_layers"]


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("Qwen2.5-0.5B", 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))),
        ("Llama-3.1-8B", 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))),
    ],
)
def test_adapters_of_rank_16_are_on_all_linear_layers_but_the_head(name: str, adapters: int) -> None:
    for method in (_LORA, _QLORA):
        size = size_of(_BY_NAME[name], method)
        assert (size.trained, size.parameters) == (adapters, _WEIGHTS[name] + adapters)


def test_a_head_has_a_tensor_of_its_own_only_if_it_is_not_tied() -> None:
    untied = {name for name, model in _BY_NAME.items() if "lm_head.weight" in tensor_shapes(model)}
    assert untied == {"Mistral-7B-v0.3", "Llama-3.1-8B", "Qwen2.5-14B", "Qwen2.5-32B", "Llama-3.1-70B"}
