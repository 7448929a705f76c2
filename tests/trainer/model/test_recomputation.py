"""What is recomputed in the backward pass: how often each operator runs, and that gradients are the
same bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.resource import LoraSpec
from finetune_trainer.data.batching import packed_layout
from finetune_trainer.kernels import packed_attention, packed_row
from finetune_trainer.model import activation_checkpointing
from finetune_trainer.model import lora as adapters
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.parallel.estimate.recomputation import (
    EVERYTHING,
    NOTHING,
    SELECTIVE,
    Recomputation,
    possible,
)

_LAYERS = 4


class _Operators(TorchDispatchMode):
    """Counts the operators that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _step(recompute: Recomputation, *, full: bool) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Returns the gradients of a packed row, and the operators that computed them."""
    packed_attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=_LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, attn_implementation=packed_attention.NAME,
    )  # fmt: skip
    base = LlamaForCausalLM._from_config(config, dtype=torch.float32)
    loaded = LoadedModel(base, base, False, "")
    if not full:
        base.requires_grad_(False)
        loaded = adapters.adapt(loaded, LoraSpec(rank=4, target_modules=("all-linear",), dropout=0.5), 1)
    if recompute:
        activation_checkpointing.enable(loaded, recompute.share, keeps_attention=recompute.keeps_attention)
    row = packed_layout.pack([20, 30, 14], [0, 0, 0]).layout
    ids = torch.arange(row.size)[None] % 128
    loaded.model.train()
    with _Operators() as operators, packed_row.computing(row):
        loaded.model(input_ids=ids, position_ids=ids, use_cache=False).logits.float().pow(2).sum().backward()
    gradients = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    return gradients, operators.counts


# What is recomputed, and in how many layers the products and attention are computed twice.
_CASES = {
    "everything": (EVERYTHING, _LAYERS, _LAYERS),
    "everything except attention": (SELECTIVE, _LAYERS, 0),
    "half of the layers, except attention": (Recomputation(0.5, keeps_attention=True), 2, 0),
    "a third of the layers": (Recomputation(1 / 3), 2, 2),
}


@pytest.mark.parametrize("full", [False, True], ids=["LoRA with dropout", "full"])
@pytest.mark.parametrize(("recompute", "layers", "attention"), _CASES.values(), ids=_CASES)
def test_as_many_layers_are_recomputed_and_gradients_are_the_same_bits(
    recompute: Recomputation, layers: int, attention: int, full: bool
) -> None:
    expected, once = _step(NOTHING, full=full)
    gradients, counts = _step(recompute, full=full)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert counts["finetune.attend.default"] == once["finetune.attend.default"] + attention
    assert once["finetune.attend.default"] == _LAYERS
    # Each layer has one SiLU, which no backward pass calls.
    assert counts["aten.silu.default"] == once["aten.silu.default"] + layers


def test_auto_recomputes_in_parts_on_gpus_only() -> None:
    assert possible("auto", "cpu") == (NOTHING, EVERYTHING)
    on_gpus = possible("auto", "cuda")
    assert (on_gpus[0], on_gpus[-1]) == (NOTHING, EVERYTHING)
    assert [each.layers(32) for each in on_gpus] == [0, 8, 16, 24, 32, 32]
    assert (SELECTIVE.under("zero3"), SELECTIVE.under("fsdp")) == (EVERYTHING, SELECTIVE)
    assert [possible(option, "cuda") for option in ("never", "selective", "always")] == [
        (NOTHING,),
        (SELECTIVE,),
        (EVERYTHING,),
    ]
