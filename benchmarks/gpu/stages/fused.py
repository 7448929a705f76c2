"""Tests whether the fused kernels are exact and used here, and measures their bandwidth and what
they save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu import child, kit, timing

from finetune_trainer.kernels import fused_modules
from finetune_trainer.kernels.cuda import elementwise, modules, reference

_LAYERS = 2
_MAX_ERROR = 2.0


def run(stage: child.Stage) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        with stage.guarded(f"kernels, {str(dtype)[6:]}"):
            _kernels(stage, dtype)
    with stage.guarded("taken"):
        _compared(stage)


def _kernels(stage: child.Stage, dtype: torch.dtype) -> None:
    """Each kernel at the sizes of an 8B model: its largest error against float64 in units of the
    last place, and the bytes that it reads and writes per second."""
    shape, tokens = (kit.TINY, 64) if stage.setting.tiny else (kit.LLAMA_8B, 6208)
    device = stage.setting.device
    torch.manual_seed(0)
    hidden, delta = (torch.randn(tokens, shape.hidden, device=device).to(dtype) for _ in range(2))
    gate, up = (torch.randn(tokens, 3 * shape.hidden, device=device).to(dtype) for _ in range(2))
    weight, size = torch.randn(shape.hidden, device=device).to(dtype), 64
    heads = hidden.view(1, tokens, -1, size).transpose(1, 2)
    cos, sin = (torch.randn(1, tokens, size, device=device).to(dtype) for _ in range(2))
    inverse = elementwise.rms_norm(hidden, weight, 1e-5, False)[1]
    wide = [t.double() for t in (hidden, delta, weight, gate, up, heads, cos, sin)]
    x, d, w, g, u, h, c, s = wide
    works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "norm": (
            lambda: elementwise.rms_norm(hidden, weight, 1e-5, False)[0],
            lambda: reference.rms_norm(x, None, w, 1e-5, False)[1],
        ),
        "norm of a sum": (
            lambda: elementwise.add_rms_norm(hidden, delta, weight, 1e-5, False)[0],
            lambda: x + d,
        ),
        "norm, backward": (
            lambda: elementwise.rms_norm_backward(delta, None, hidden, weight, inverse, False, False)[0],
            lambda: reference.rms_norm_backward(d, None, x, w, inverse.double(), False, False)[0],
        ),
        "swiglu": (lambda: elementwise.gated(gate, up, False), lambda: reference.gated(g, u, False)),
        "swiglu, backward": (
            lambda: elementwise.gated_backward(up, gate, up, False)[0],
            lambda: reference.gated_backward(u, g, u, False)[0],
        ),
        "geglu": (lambda: elementwise.gated(gate, up, True), lambda: reference.gated(g, u, True)),
        "rotary": (
            lambda: elementwise.rotary(heads, cos, sin, False),
            lambda: reference.rotary(h, c, s, False),
        ),
    }  # fmt: skip
    values = {
        "norm": 2,
        "norm of a sum": 4,
        "norm, backward": 3,
        "swiglu": 3,
        "swiglu, backward": 5,
        "geglu": 3,
        "rotary": 2,
    }
    for name, (work, exact) in works.items():
        _kernel(stage, f"{name}, {str(dtype)[6:]}", work, exact, values[name])


def _kernel(stage: child.Stage, name: str, work: Callable[[], Any], exact: Callable[[], Any], tensors: int) -> None:
    computed, expected = work(), exact()
    unit = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30) * torch.finfo(computed.dtype).eps
    error = float(((computed.double() - expected).abs() / unit).max())
    duration = timing.seconds(work, stage.setting.device, budget=0.1)
    speed = tensors * computed.numel() * computed.element_size() / duration / 1e9
    stage.report(
        name, "right" if error <= _MAX_ERROR else "wrong",
        f"off by at most {error:.2f} units in the last place; {speed:.0f} GB/s", ulps=error, gigabytes_per_second=speed,
    )  # fmt: skip


def _compared(stage: child.Stage) -> None:
    shape, tokens = (kit.TINY, 64) if stage.setting.tiny else (kit.LLAMA_8B, 6208)
    variants: dict[str, Callable[[Any], str]] = {
        "Transformers' own": lambda model: "",
        "keeping less": _keep_less,
        "Liger's": _liger,
        "ours": lambda model: str(modules.replace_modules(model, torch.device(stage.setting.device))),
    }
    if stage.setting.device != "cuda":
        variants.pop("Liger's")
        stage.report("Liger's", "skipped", "its kernels are Triton's and need a GPU")
    for name, replace in variants.items():
        with stage.guarded(name):
            model = _model(stage, shape)
            decision = replace(model)
            if name == "ours":
                taken = decision == str(modules.Replaced(2 * _LAYERS + 1, _LAYERS, _LAYERS, _LAYERS))
                stage.report("taken", "right" if taken else "wrong", f"{decision}, in {_LAYERS} layers")
            _measure(stage, name, model, shape, tokens)


def _model(stage: child.Stage, shape: kit.Shape) -> Any:
    from transformers import LlamaForCausalLM

    config = shape.config()
    config.num_hidden_layers, config.vocab_size = _LAYERS, 512
    torch.manual_seed(0)
    with torch.device(stage.setting.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.requires_grad_(False)


def _keep_less(model: Any) -> str:
    norms, products = fused_modules.replace_modules(model)
    return f"{norms} norms, {products} gated products"


def _liger(model: Any) -> str:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        model=model, rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return ""


def _measure(stage: child.Stage, name: str, model: Any, shape: kit.Shape, tokens: int) -> None:
    device = stage.setting.device
    hidden = torch.randn(1, tokens, shape.hidden, device=device).bfloat16().requires_grad_()

    def work() -> None:
        hidden.grad = None
        out = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        out.backward(torch.ones_like(out))

    duration, peak = timing.seconds(work, device), timing.peak_bytes(work, device)
    stage.report(
        f"{_LAYERS} layers, {name}", "figure",
        f"{duration * 1e3:.2f} ms forward and backward of {tokens} tokens, {peak / 2**20:.0f} MiB more",
        seconds_each=duration, peak_bytes=peak, bytes_per_token=peak / tokens / _LAYERS,
    )  # fmt: skip


if __name__ == "__main__":
    child.main("fused", run)
