"""Norms and gated products that keep less: the same values and gradients as the models' own, or not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune_trainer import fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_same_with_them(models: dict[str, Path], dtype: torch.dtype) -> None:
    ids = torch.arange(3, 23)[None]
    found = []
    for put_in in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=dtype).requires_grad_(False)
        if put_in:
            layers = len(model.model.layers)
            assert fused.put_in(model) == (2 * layers + 1, layers)
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
        found.append((logits.detach(), *torch.autograd.grad(logits.square().mean(), embedded)))
    (values, gradient), (other, other_gradient) = found
    assert torch.equal(values, other)
    largest = gradient.float().abs().max()
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    assert (gradient.float() - other_gradient.float()).abs().max() < limit * largest


class ShiftedRMSNorm(nn.Module):
    """As Gemma's: its weight is counted from one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.eps = 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_what_computes_something_else_or_learns_stays_as_it_is(models: dict[str, Path]) -> None:
    assert fused.put_in(ShiftedRMSNorm()) == (0, 0)
    learning = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert fused.put_in(learning)[0] == 0
