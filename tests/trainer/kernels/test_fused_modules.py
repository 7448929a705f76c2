"""Norms and gated products that store less for the backward pass give the values and gradients of
the models' own modules, or aren't used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune_trainer.kernels import fused_modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_same_with_fused_modules(models: dict[str, Path], dtype: torch.dtype) -> None:
    ids = torch.arange(3, 23)[None]
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=dtype).requires_grad_(False)
        if fused:
            layers = len(model.model.layers)
            assert fused_modules.replace_modules(model) == (2 * layers + 1, layers)
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
        results.append((logits.detach(), *torch.autograd.grad(logits.square().mean(), embedded)))
    (values, gradient), (fused_values, fused_gradient) = results
    assert torch.equal(values, fused_values)
    largest = gradient.float().abs().max()
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    assert (gradient.float() - fused_gradient.float()).abs().max() < limit * largest


class ShiftedRMSNorm(nn.Module):
    """A norm like Gemma's, whose weight is relative to one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.eps = 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_modules_that_compute_something_else_or_are_trained_arent_replaced(models: dict[str, Path]) -> None:
    assert fused_modules.replace_modules(ShiftedRMSNorm()) == (0, 0)
    trainable = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert fused_modules.replace_modules(trainable)[0] == 0
