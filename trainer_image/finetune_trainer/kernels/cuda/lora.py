"""Makes LoRA adapters add to their layer's result within their second matrix product.

PEFT computes result + B(A(x)) x scale as a product, a multiplication and an addition, each of which
reads and writes a tensor of the result's size and rounds it. One `addmm` does all three and rounds
once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def replace_modules(model: nn.Module) -> int:
    """Replaces the forward pass of plain adapters on linear layers. Returns how many there are.

    Adapters on quantized layers, and variants such as DoRA, stay as they are. The second matrix is
    read without calling its module, so its weights must not be gathered by that call.
    """
    try:
        from peft.tuners.lora.layer import Linear
    except ImportError:
        return 0
    return sum(_replace(module) for module in model.modules() if type(module) is Linear)


def _replace(module: Any) -> bool:
    names = list(module.lora_A)
    if len(names) != 1 or names[0] in module.lora_variant:
        return False
    name = names[0]
    down, up = module.lora_A[name], module.lora_B[name]
    if type(down) is not nn.Linear or type(up) is not nn.Linear or up.bias is not None or down.bias is not None:
        return False
    original = module.forward

    def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        one_dtype = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == up.weight.dtype
        usual = one_dtype and not (module.disable_adapters or module.merged or arguments or options)
        if not usual or module.active_adapters != [name]:
            return original(hidden, *arguments, **options)
        result = module.base_layer(hidden)
        inputs = module._cast_input_dtype(hidden, down.weight.dtype)
        inner = down(module.lora_dropout[name](inputs))
        flat = result.reshape(-1, result.shape[-1])
        added = torch.addmm(flat, inner.reshape(-1, inner.shape[-1]), up.weight.t(), alpha=module.scaling[name])
        return added.view(result.shape).to(result.dtype)

    module.forward = forward
    return True
