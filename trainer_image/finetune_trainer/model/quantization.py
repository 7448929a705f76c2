"""Quantizes a frozen base with bitsandbytes, and lets ranks share a base in nf4.

A 4-bit weight is a matrix of bytes, packed two values to a byte, with constants that only
bitsandbytes understands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from finetune_trainer.errors import RunError


@dataclass(frozen=True)
class Quantization:
    """Describes how bitsandbytes quantizes a frozen base: int8, or nf4 with quantized constants
    (QLoRA).

    `device` computes it, since another one may round differently. `kept_on` is where the quantized
    weights stay: on the same device, or in the host's memory, from where they are sharded.
    """

    kind: Literal["int8", "nf4"]
    device: torch.device
    kept_on: torch.device | None = None

    def options(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """Returns options for `from_pretrained`, which quantizes each weight as soon as it is
        read."""
        return {"quantization_config": self.config(compute_dtype), "device_map": {"": self.kept_on or self.device}}

    def config(self, compute_dtype: torch.dtype) -> Any:
        """Returns Transformers' configuration of bitsandbytes."""
        from transformers import BitsAndBytesConfig

        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Makes weights that are read inside be quantized on `device`, one at a time, wherever they
        are kept."""
        if self.kind != "nf4" or self.kept_on in (None, self.device):
            yield
            return
        from bitsandbytes.nn import Params4bit

        quantize = Params4bit._quantize

        def elsewhere(weight: Any, destination: Any) -> Any:
            quantized = quantize(weight, self.device)
            quantized.data = quantized.data.to(destination)
            quantized.quant_state.to(destination)
            return quantized

        Params4bit._quantize = elsewhere
        try:
            yield
        finally:
            Params4bit._quantize = quantize

    def outline(self, model: Any, dtype: torch.dtype) -> None:
        """Replaces the linear layers of a model on the meta device as `from_pretrained` does, but
        leaves their weights unpacked."""
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(self.config(dtype), pre_quantized=False)
        quantizer.preprocess_model(model, dtype=dtype, device_map={"": "meta"})
        quantizer.postprocess_model(model)


def warning(kind: str, device_type: str, dtype: torch.dtype) -> str:
    """Returns what to look out for with a quantized base, or "". It is pure.

    On CUDA, bitsandbytes converts what enters an int8 layer to float16, whose largest value is
    65,504, before it separates outliers (`MatMul8bitLt`).
    """
    if kind != "int8" or device_type != "cuda" or dtype != torch.bfloat16:
        return ""
    return (
        "bitsandbytes computes int8 layers in float16, where activations of a bfloat16 model may overflow; if steps "
        "are skipped because of values that aren't finite, or the loss is unexpectedly high, use model.quantization "
        "nf4, which computes in bfloat16"
    )


@contextmanager
def refusing_wide_inputs(model: Any, kind: str) -> Iterator[None]:
    """Refuses a model inside whose linear layers get tensors that an int8 layer can't multiply.

    bitsandbytes flattens a batch of sequences, [batch, tokens, features], and nothing wider
    (`MatMul8bitLt`). The latent attention of DeepSeek-V3 has another dimension. Raises
    RunError(InvalidConfig) with the name of the layer.
    """
    hooks = []

    def check(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() > 3:
                raise RunError(
                    "InvalidConfig",
                    f"model.quantization: int8 can't be used with this model, whose layer {name} gets tensors of "
                    f"{inputs[0].dim()} dimensions (int8 layers take at most 3); use nf4, or none",
                )

        return hook

    if kind == "int8":
        linear = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        hooks = [module.register_forward_pre_hook(check(name)) for name, module in linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_packed(module: Any) -> bool:
    """Returns whether a module is a linear layer of bitsandbytes with a 4-bit weight."""
    return hasattr(module, "quant_state") and hasattr(module, "compute_dtype")


def constants(module: Any) -> dict[str, Tensor]:
    """Returns the constants of a layer's 4-bit weight, as bitsandbytes writes them to files."""
    state: dict[str, Tensor] = module.weight.quant_state.as_dict(packed=True)
    return state


def with_constants(
    module: Any, weight: Tensor, state: Mapping[str, Tensor], device: torch.device
) -> torch.nn.Parameter:
    """Gives a layer its constants, on `device`, and returns its packed weight, a plain parameter.

    The layer finds the constants again when its weight is only gathered for its forward pass.
    """
    from bitsandbytes.functional import QuantState

    module.quant_state = QuantState.from_dict(dict(state), device=device)
    return torch.nn.Parameter(weight, requires_grad=False)


def disable_repacking(model: Any) -> None:
    """Keeps bitsandbytes from changing 4-bit weights.

    On CPUs with fast bfloat16, it rearranges them at the first evaluation and permanently rounds
    their scales to bfloat16: training would then continue from a different base than the one it
    began with.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
