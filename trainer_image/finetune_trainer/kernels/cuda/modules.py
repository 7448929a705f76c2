"""Makes a model's layers use the fused kernels: norms, gated products, the sum in front of a
layer's second norm, and rotary embeddings.

A module is recognized by what it computes: it is compared with its replacement on a few rows, with
weights of its own number format in place of the model's, so that weights may be sharded or not yet
on this rank. A module that computes anything else stays as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.kernels.cuda import elementwise

_ROWS = 3
_WIDTH = 16
_MAX_WIDTH = 2**13  # of a row that one program of a kernel can hold in registers
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True)
class Replaced:
    """Counts what uses a fused kernel. `rotary` counts the attention modules."""

    norms: int = 0
    products: int = 0
    sums: int = 0
    rotary: int = 0

    def __str__(self) -> str:
        return (
            f"{self.norms} norms, {self.products} gated products, {self.sums} sums in front of norms and "
            f"{self.rotary} rotary embeddings"
        )


@dataclass(frozen=True)
class _Norm:
    """Describes a norm that the kernel can compute; see `elementwise.rms_norm`."""

    module: Any
    epsilon: float
    shifted: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        out: Tensor = elementwise.rms_norm(hidden, self.module.weight, self.epsilon, self.shifted)[0]
        return out


def replace_modules(model: nn.Module, device: torch.device, *, sums: bool = True) -> Replaced:
    """Replaces all modules that can be replaced, for inputs on `device`.

    Without `sums`, each norm is computed on its own, as strategies need that gather a module's
    weights only when it is called. Rotary embeddings are replaced for all models of the same family
    in this process.
    """
    modules = list(model.modules())
    norms = {id(module): norm for module in modules if (norm := _norm(module, device)) is not None}
    layers = [module for module in modules if sums and _replace_layer(module, norms, device)]
    for norm in norms.values():
        _replace(norm.module, norm)
    products = [module for module in modules if _replace_product(module, device)]
    rotary = [module for module in modules if _replace_rotary(module, device)]
    return Replaced(len(norms), len(products), len(layers), len(rotary))


def _norm(module: Any, device: torch.device) -> _Norm | None:
    """Returns how the kernel computes this norm, or None if the module isn't one."""
    weight = getattr(module, "weight", None)
    epsilon = float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0)
    if not isinstance(weight, Tensor) or not type(module).__name__.endswith("RMSNorm"):
        return None
    shape = _shape(weight)
    if len(shape) != 1 or not 0 < shape[0] <= _MAX_WIDTH or weight.dtype not in _DTYPES or epsilon <= 0:
        return None
    sample = _with_sample_weight(module, device)
    inputs = (_wave(_ROWS, shape[0], weight.dtype, device),)
    kinds = (_Norm(module, epsilon, shifted) for shifted in (False, True))
    return next((kind for kind in kinds if _same(sample.forward, _Norm(sample, epsilon, kind.shifted), inputs)), None)


def _shape(weight: Any) -> tuple[int, ...]:
    """Returns the shape of a complete weight. One that ZeRO-3 has split is empty."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _copied(module: Any) -> Any:
    """Returns a shallow copy of a module, which may be sharded: FSDP2 doesn't let `copy` create
    one."""
    sample = object.__new__(type(module))
    sample.__dict__.update(module.__dict__)
    return sample


def _with_sample_weight(norm: Any, device: torch.device) -> Any:
    """Returns a copy of a norm with another weight, on `device`."""
    weight = _wave(1, _shape(norm.weight)[0], norm.weight.dtype, device)[0]
    sample = _copied(norm)
    sample._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    return sample


def _replace_product(module: Any, device: torch.device) -> bool:
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED):
        return False
    dtype = _dtype(module)
    factors = _wave(_ROWS, 8, dtype, device), _wave(_ROWS, 9, dtype, device)[:, 1:]
    for gelu in (False, True):

        def product(gate: Tensor, up: Tensor, gelu: bool = gelu) -> Tensor:
            out: Tensor = elementwise.gated(gate, up, gelu)
            return out

        if _same(lambda gate, up: module.act_fn(gate) * up, product, factors):
            sample = _copied(module)
            parts = zip(_GATED, (_Scaled(0.75), _Scaled(-0.5), _Scaled(1.25), module.act_fn), strict=True)
            sample._modules = dict(parts)
            if not _same(sample.forward, _product_forward(sample, product), factors[:1]):
                return False
            _replace(module, _product_forward(module, product))
            return True
    return False


def _product_forward(module: Any, product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        return module.down_proj(product(module.gate_proj(hidden), module.up_proj(hidden)))  # type: ignore[no-any-return]

    return forward


def _replace_layer(layer: Any, norms: dict[int, _Norm], device: torch.device) -> bool:
    """Replaces a layer whose second norm reads the sum of the layer's input and attention's
    output."""
    if {name for name, _ in layer.named_children()} != _LAYER:
        return False
    norm = norms.get(id(layer.post_attention_layernorm))
    if norm is None or id(layer.input_layernorm) not in norms:
        return False
    sample = _copied(layer)
    sample_norms = [
        _with_sample_weight(layer._modules[f"{name}_layernorm"], device) for name in ("input", "post_attention")
    ]
    sample._modules = {
        "self_attn": _AttentionSample(), "mlp": _Scaled(0.75), "input_layernorm": sample_norms[0],
        "post_attention_layernorm": sample_norms[1],
    }  # fmt: skip
    sample_norm = _Norm(sample_norms[1], norm.epsilon, norm.shifted)
    inputs = (_wave(_ROWS, _shape(norm.module.weight)[0], norm.module.weight.dtype, device)[None],)
    if not _same(sample.forward, _layer_forward(sample, sample_norm), inputs):
        return False
    _replace(layer, _checkpointed(layer, _layer_forward(layer, norm)))
    return True


def _checkpointed(layer: Any, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns `forward`, which recomputes its activations if the layer's own forward pass would.

    In current Transformers, that is what checkpoints; in older ones, it is the layer's `__call__`.
    """
    if getattr(getattr(type(layer).forward, "__code__", None), "co_name", "") != "forward_with_checkpointing":
        return forward

    def checkpointed(hidden_states: Tensor, **options: Any) -> Tensor:
        if layer.gradient_checkpointing and layer.training:
            options = {**options, "past_key_values": None, "use_cache": False}
            return layer._gradient_checkpointing_func(functools.partial(forward, **options), hidden_states)  # type: ignore[no-any-return]
        return forward(hidden_states, **options)

    return checkpointed


def _layer_forward(layer: Any, norm: _Norm) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)[0]
        total, normed, _ = elementwise.add_rms_norm(
            hidden_states, attended, norm.module.weight, norm.epsilon, norm.shifted
        )
        return total + layer.mlp(normed)  # type: ignore[no-any-return]

    return forward


def _replace_rotary(module: Any, device: torch.device) -> bool:
    """Replaces the function by which an attention module rotates queries and keys."""
    source = sys.modules.get(type(module).__module__)
    original = getattr(source, "apply_rotary_pos_emb", None)
    size = getattr(module, "head_dim", None)
    if original is None or not type(module).__name__.endswith("Attention") or not isinstance(size, int) or size % 2:
        return False
    if getattr(original, "replaces", None) is not None:
        return True
    dtype = _dtype(module)

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *arguments: Any, **options: Any) -> Any:
        usual = query.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == query.shape[-1]
        if arguments or options or not usual or query.device.type != device.type or query.dtype not in _DTYPES:
            return original(query, key, cos, sin, *arguments, **options)
        return tuple(elementwise.rotary(heads, cos, sin, False) for heads in (query, key))

    def sample(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda query, key, cos, sin: torch.cat(function(query, key, cos, sin), 1)

    query, key, cos, sin = (_wave(heads * _ROWS, size, dtype, device) for heads in (2, 1, 1, 1))
    tables = cos[None].sin(), sin[None].cos()
    heads = query.view(1, 2, _ROWS, size), key.view(1, 1, _ROWS, size)
    if not _same(lambda q, k: sample(original)(q, k, *tables), lambda q, k: sample(rotate)(q, k, *tables), heads):
        return False
    rotate.replaces = original  # type: ignore[attr-defined]
    vars(source)["apply_rotary_pos_emb"] = rotate
    return True


class _Scaled(nn.Module):
    """Stands in for a part of a layer while its replacement is compared."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor


class _AttentionSample(nn.Module):
    """Stands in for attention while a layer's replacement is compared."""

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        return hidden_states * -0.5, None


def _replace(module: Any, forward: Callable[..., Tensor]) -> None:
    """Makes `forward` the module's own for tensors in the kernels' number formats."""
    original = module.forward

    def replaced(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        if arguments or hidden.dtype not in _DTYPES:
            return original(hidden, *arguments, **options)
        return forward(hidden, **options)

    module.forward = replaced


def _dtype(module: nn.Module) -> torch.dtype:
    """Returns the number format of a module's inputs, as far as its weights tell."""
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next((dtype for dtype in dtypes if dtype in _DTYPES), torch.bfloat16)


def _wave(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers between -2 and 2 that are the same in every run."""
    wave = torch.arange(rows * columns, device=device, dtype=torch.float64).mul_(1.7).sin_().mul_(2)
    return wave.view(rows, columns).to(dtype)


def _same(theirs: Callable[..., Any], ours: Callable[..., Any], inputs: tuple[Tensor, ...]) -> bool:
    """Returns whether both functions compute the same values and gradients up to rounding."""
    try:
        expected, computed = (_with_gradients(function, inputs) for function in (theirs, ours))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False  # theirs needs or returns something else
    limit = 2e-2 if inputs[0].dtype.itemsize < 4 else 1e-4
    pairs = zip(expected, computed, strict=True)
    same_kind = (a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    return all(same_kind) and all(
        torch.allclose(a, b, rtol=limit, atol=limit) for a, b in zip(expected, computed, strict=True)
    )


def _with_gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the function's value, followed by the gradients with respect to its inputs."""
    with torch.enable_grad():
        variables = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*variables)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, variables, weights)]
