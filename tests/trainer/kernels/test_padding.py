"""What is computed for padding never reaches a real token: in no kernel, in no model, and at no
magnitude."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from finetune_api.resource import GenerationSpec
from finetune_trainer.data.batching import packed_layout
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.evaluation import generation
from finetune_trainer.evaluation.generation import GenerationSettings
from finetune_trainer.kernels import (
    attention_avx512,
    attention_cpu,
    attention_reference,
    chunked_cross_entropy,
    packed_row,
)
from finetune_trainer.model import loading as model_
from finetune_trainer.model.loss import LossSum
from trainer.support.poisoned_padding import poisoned

_POISON = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 1e30}
_SCALE = 0.35

_ROWS = {
    "separate": ([28, 1, 42, 52, 1, 41, 130], [0] * 7),
    "prefixes that several share": ([64, 30, 30, 31, 50, 151], [0, 20, 20, 29, 0, 50]),
    "one short row": ([5], [0]),
}
# dtype, and (heads, heads of the keys, size of a head). The compiled kernel needs bfloat16 and head
# sizes that are multiples of 16.
_WAYS = {
    "products, float32": (torch.float32, (4, 2, 8)),
    "products, float64": (torch.float64, (4, 4, 16)),
    "products, bfloat16": (torch.bfloat16, (4, 2, 8)),
    "compiled, bfloat16": (torch.bfloat16, (4, 2, 32)),
    "plain, float32": (torch.float32, (4, 2, 8)),
}


def _attend(way: str, row: packed_layout.Layout, parts: list[Tensor]) -> Tensor:
    if way.startswith("plain"):
        return attention_reference.attend(row, *parts, _SCALE)
    with packed_row.computing(row):
        return attention_cpu.attend(*parts, _SCALE)[0]


def _output_and_gradients(way: str, row: packed_layout.Layout, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Returns attention's output and the gradients of query, key and value."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with packed_row.computing(row):
        out = _attend(way, row, leaves)
        gradients = torch.autograd.grad(out, leaves, weight)
    return [out.detach(), *(gradient.transpose(1, 2) for gradient in gradients)]


@pytest.mark.parametrize("rows", _ROWS)
@pytest.mark.parametrize("way", _WAYS)
def test_padding_reaches_no_real_token_in_attention(way: str, rows: str, kernel: str) -> None:
    dtype, (heads, kv, size) = _WAYS[way]
    lengths, shared = _ROWS[rows]
    packed = packed_layout.pack(lengths, shared)
    row, real = packed.layout, packed.layout.size - len(packed.padding)
    assert real < row.size
    torch.manual_seed(0)
    inputs = [torch.randn(1, n, row.size, size, dtype=dtype) for n in (heads, kv, kv)]
    assert attention_avx512.supports(inputs[0], inputs[1]) == way.startswith("compiled")
    weight = torch.randn(1, row.size, heads, size, dtype=dtype)
    weight[:, real:] = 0
    clean = _output_and_gradients(way, row, inputs, weight)
    for name, poison in _POISON.items():
        poisoned_inputs = [tensor.clone() for tensor in inputs]
        for tensor in poisoned_inputs:
            tensor[:, :, real:] = poison
        for part, one, other in zip(
            ("out", "q", "k", "v"), clean, _output_and_gradients(way, row, poisoned_inputs, weight), strict=True
        ):
            assert torch.equal(one[:, :real], other[:, :real]), (name, part)


@pytest.mark.parametrize("way", ["products, float32", "compiled, bfloat16"])
def test_gradients_stay_finite_if_a_token_has_high_scores_for_the_keys_of_another_segment(
    way: str, kernel: str
) -> None:
    """Padding inside a bucket of segments once combined a token's query and its sum of exponentials
    with keys that it never attends to."""
    dtype, (heads, kv, size) = _WAYS[way]
    segments = ((0, 28), (28, 29), (29, 71), (71, 123), (123, 124), (124, 165))
    row = packed_layout.Layout(
        165, segments, (packed_layout.SharedBlock(0, 27, 28, 29), packed_layout.SharedBlock(71, 122, 123, 124))
    )
    torch.manual_seed(0)
    inputs = [torch.randn(1, n, row.size, size) for n in (heads, kv, kv)]
    inputs[1][:, :, 124:] += 3.0
    inputs[0][:, :, 0] = 30.0
    inputs = [tensor.to(dtype) for tensor in inputs]
    weight = torch.randn(1, row.size, heads, size).to(dtype)
    exact = _output_and_gradients("plain", row, [tensor.double() for tensor in inputs], weight.double())
    for tensor, expected in zip(_output_and_gradients(way, row, inputs, weight), exact, strict=True):
        assert tensor.isfinite().all()
        assert float((tensor.double() - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_row_is_filled_with_copies_of_the_start_of_its_longest_example() -> None:
    """So padding overflows only if that example does."""
    row = packed_layout.pack([9, 40, 12], [0, 0, 0])
    assert row.layout.size == 64
    assert row.padding.tolist() == [9, 10, 11]
    short = packed_layout.pack([5], [0])
    assert short.padding.tolist() == [*range(5)] * 5 + [0, 1]
    assert short.layout.segments[1:] == ((5, 10), (10, 15), (15, 20), (20, 25), (25, 30), (30, 32))
    assert packed_layout.pack([32], [0]).padding.size == 0


@pytest.mark.parametrize("trained", ["hidden", "hidden and weight"])
@pytest.mark.parametrize("poison", _POISON.values(), ids=_POISON)
def test_a_position_without_a_label_never_reaches_the_head(poison: float, trained: str) -> None:
    """A column that is used in one row is padding in another."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 50)
    layer.requires_grad_(trained == "hidden and weight")
    head = chunked_cross_entropy.ChunkedHead(layer)
    positions = torch.tensor([0, 1, 2, 4])  # of two rows with three columns
    targets = chunked_cross_entropy.Targets(torch.tensor([3, 9, 3, 7]), torch.tensor([0, 1, 2, 3]), positions, None)
    gradients = []
    for value in (0.5, poison):
        hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
        hidden[1, 0], hidden[1, 2] = value, value
        hidden.requires_grad_()
        layer.zero_grad(set_to_none=True)
        with head.computing(targets):
            layer(hidden).sum().backward()
        gradients.append([hidden.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert len(gradients[0]) == (3 if trained == "hidden and weight" else 1)


def test_a_rank_without_rows_adds_a_zero_whatever_its_token_computes(models: dict[str, Path]) -> None:
    loaded = model_.load(models["llama"], dtype=torch.float32, longest=8)

    class Rows:
        pairs = False

        def example(self, index: int) -> tuple[np.ndarray, ...]:
            return np.array([7, 8]), np.array([False, True]), np.array(0)

    collator = Collator(True, True, False, 0, 0, torch.device("cpu"))
    batch = collator(Rows(), ())  # type: ignore[arg-type]
    assert batch.inputs["input_ids"].tolist() == [[7]]  # a token that other ranks compute as well
    with torch.no_grad():
        loaded.base.lm_head.weight.fill_(float("inf"))
    loss = LossSum.of(loaded.base, None, "cpu")(loaded.base, batch)
    assert loss.item() == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("poison", _POISON.values(), ids=_POISON)
def test_answers_dont_depend_on_what_padding_computes(poison: float, family: str, models: dict[str, Path]) -> None:
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    unchanged = auto.from_pretrained(models[family]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[family])
    loaded = model_.load(models[family], dtype=torch.float32, longest=32)
    pad = 5
    poisoned(loaded.base, pad, poison)
    settings = GenerationSettings(_Padding(tokenizer, pad), frozenset({4}), 6, GenerationSpec(), None)
    prompts = [[7, 8, 9, 10, 11, 12], [20], [30, 31, 32]]
    together = generation.generate(loaded.base, prompts, settings, seed=0, heartbeat=lambda: None)
    separately = [
        generation.generate(unchanged, [prompt], settings, seed=0, heartbeat=lambda: None)[0] for prompt in prompts
    ]
    assert together == separately


class _Padding:
    """A tokenizer with another padding token."""

    def __init__(self, tokenizer: object, pad: int) -> None:
        self._tokenizer, self.pad_token_id = tokenizer, pad

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)
