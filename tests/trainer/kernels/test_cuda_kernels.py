"""The Triton kernels, run by Triton's interpreter and compiled for every supported architecture of
GPUs, and the operators and modules that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from finetune_trainer.kernels.cuda import elementwise, lora, modules
from finetune_trainer.model import activation_checkpointing
from finetune_trainer.model.loading import LoadedModel
from trainer.support.printed_figures import printed_figures

_FEW_BYTES = 16
_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return printed_figures("interpreted_kernels", TRITON_INTERPRET="1")


def test_interpreted_kernels_are_as_exact_as_their_number_format(errors: dict[str, float]) -> None:
    """Errors are relative to float64, in units of the last place of the number format."""
    assert len(errors) > 600
    assert {name: error for name, error in errors.items() if not error <= 2.0} == {}


def test_every_kernel_compiles_for_every_architecture_without_spilling() -> None:
    figures = printed_figures("compiled_kernels")
    assert {name.split()[1] for name in figures} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert len({name.split()[0] for name in figures}) >= 14
    assert {name: spilled for name, spilled in figures.items() if spilled > _FEW_BYTES} == {}


@pytest.mark.parametrize("shifted", [False, True])
def test_the_operators_gradients_are_those_of_their_values(shifted: bool) -> None:
    hidden, delta = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, 3, 4, dtype=torch.float64)
    heads = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda x, w: elementwise.rms_norm(x, w, 1e-5, shifted)[0], (hidden, weight)),
        (lambda x, d, w: elementwise.add_rms_norm(x, d, w, 1e-5, shifted)[:2], (hidden, delta, weight)),
        (lambda g, u: elementwise.gated(g, u, shifted), (hidden, delta)),
        (lambda h: elementwise.rotary(h, table.cos(), table.sin(), shifted), (heads,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)


def test_the_operators_keep_the_rules_of_custom_operators() -> None:
    """They have fake implementations that agree with the real ones, and don't change or return
    their inputs."""
    hidden, delta = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    weight, table = torch.randn(8, requires_grad=True), torch.randn(1, 3, 4)
    heads = torch.randn(2, 3, 5, 4).transpose(1, 2).requires_grad_()
    slope, inverse = torch.randn(2, 3, 8), torch.rand(2, 3)
    for operator, inputs in (
        (elementwise.rms_norm, (hidden, weight, 1e-5, False)),
        (elementwise.add_rms_norm, (hidden, delta.bfloat16(), weight, 1e-5, True)),
        (elementwise.rms_norm_backward, (slope, slope, hidden.detach(), weight.detach(), inverse, False, True)),
        (elementwise.rms_norm_backward, (slope, None, hidden.detach(), weight.detach(), inverse, True, False)),
        (elementwise.gated, (hidden, delta, True)),
        (elementwise.gated_backward, (slope, hidden.detach(), delta.detach(), False)),
        (elementwise.rotary, (heads, table, table, False)),
    ):
        torch.library.opcheck(operator, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_a_model_computes_the_same_with_the_kernels(
    models: dict[str, Path], dtype: torch.dtype, trained: bool, recompute: bool
) -> None:
    results = []
    for fused in (False, True):
        model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=dtype).requires_grad_(trained).train()
        with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb):
            if fused:
                layers = len(model.model.layers)
                replaced = modules.replace_modules(model, _CPU)
                assert replaced == modules.Replaced(2 * layers + 1, layers, layers, layers)
            if recompute:
                activation_checkpointing.enable(LoadedModel(model, model, False, ""))
            calls: list[object] = []
            model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(None))
            embedded = model.get_input_embeddings()(torch.arange(3, 23)[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
            logits.square().mean().backward()
            assert len(calls) == (2 if recompute else 1)
        gradients = [embedded.grad, *(p.grad for n, p in model.named_parameters() if trained and "norm" in n)]
        results.append((logits.detach(), *gradients))
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    for usual, fused_value in zip(*results, strict=True):
        assert (usual.float() - fused_value.float()).abs().max() < limit * usual.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_adds_to_its_layer_within_a_product(dtype: torch.dtype, dropout: float) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model: Any = peft.get_peft_model(
            nn.Sequential(nn.Linear(48, 32, dtype=dtype)),
            peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout),
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter.data)
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        model.base_model.model[0].cast_input_dtype_enabled = False
        assert (lora.replace_modules(model) if fused else 1) == 1
        inputs = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), _Names() as names:
            torch.manual_seed(1)
            out = model.train()(inputs)
        assert ("aten.addmm.default" in names.after_base) == fused
        assert ("aten.add.Tensor" in names.after_base) != fused
        with model.disable_adapter():
            base = model(inputs)
        out.float().square().sum().backward()
        results.append((out, base, inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad)))
    for usual, fused_value in zip(*results, strict=True):
        limit = (1e-6 if dtype == torch.float32 else 2e-2) * usual.abs().max()
        assert (usual - fused_value).abs().max() <= limit


class _Names(TorchDispatchMode):
    """Lists the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def after_base(self) -> list[str]:
        """The operations after those of the base layer."""
        return self.names[self.names.index("aten.addmm.default") + 1 :]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class ShiftedRMSNorm(nn.Module):
    """A norm like Gemma's, whose weight is relative to one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))
        self.eps = 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)).to(hidden.dtype)


class DoubledRMSNorm(ShiftedRMSNorm):
    """A norm that no kernel computes."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


class GatedTanh(nn.Module):
    """A gated product like Gemma's, whose activation is GELU's approximation by tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn: nn.Module = nn.GELU(approximate="tanh")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


def test_modules_are_recognized_by_what_they_compute() -> None:
    unknown_activation = GatedTanh()
    unknown_activation.act_fn = nn.ReLU()
    for module, replaced in (
        (ShiftedRMSNorm(), modules.Replaced(norms=1)),
        (DoubledRMSNorm(), modules.Replaced()),
        (GatedTanh(), modules.Replaced(products=1)),
        (unknown_activation, modules.Replaced()),
    ):
        inputs = torch.randn(2, 3, 8 if isinstance(module, ShiftedRMSNorm) else 4)
        before = module(inputs)
        assert modules.replace_modules(module, _CPU) == replaced
        assert torch.allclose(module(inputs), before, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "replaced"), [(ShiftedRMSNorm, modules.Replaced(norms=1)), (DoubledRMSNorm, modules.Replaced())]
)
def test_a_norm_whose_weight_is_split_is_recognized_by_what_it_computes_too(
    norm: type[ShiftedRMSNorm], replaced: modules.Replaced
) -> None:
    """Between two calls, a weight that ZeRO-3 has split is empty, and its shape is an attribute."""
    module, inputs = norm(), torch.randn(2, 3, 8)
    weight, before = module.weight.detach().clone(), module(inputs)
    module.weight.ds_shape = weight.shape  # type: ignore[attr-defined]
    module.weight.data = torch.empty(0)
    assert modules.replace_modules(module, _CPU) == replaced
    module.weight.data = weight
    assert torch.allclose(module(inputs), before, atol=1e-6)
