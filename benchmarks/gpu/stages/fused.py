"""Tests whether fused norms and gated products are used here, and measures what they save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu import child, kit, timing

from finetune_trainer.kernels import fused_modules

_LAYERS = 2


def run(stage: child.Stage) -> None:
    with stage.guarded("taken"):
        _compared(stage)


def _compared(stage: child.Stage) -> None:
    shape, tokens = (kit.TINY, 64) if stage.setting.tiny else (kit.LLAMA_8B, 6208)
    variants: dict[str, Callable[[Any], str]] = {
        "Transformers' own": lambda model: "",
        "ours": _replace_modules,
        "Liger's": _liger,
    }
    if stage.setting.device != "cuda":
        variants.pop("Liger's")
        stage.report("Liger's", "skipped", "its kernels are Triton's and need a GPU")
    for name, replace in variants.items():
        with stage.guarded(name):
            model = _model(stage, shape)
            decision = replace(model)
            if name == "ours":
                taken = decision == f"{2 * _LAYERS + 1} norms, {_LAYERS} gated products"
                stage.report("taken", "right" if taken else "wrong", f"{decision} of {2 * _LAYERS + 1} and {_LAYERS}")
            _measure(stage, name, model, shape, tokens)


def _model(stage: child.Stage, shape: kit.Shape) -> Any:
    from transformers import LlamaForCausalLM

    config = shape.config()
    config.num_hidden_layers, config.vocab_size = _LAYERS, 512
    torch.manual_seed(0)
    with torch.device(stage.setting.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.requires_grad_(False)


def _replace_modules(model: Any) -> str:
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
