"""Describes what adapters change of a mixture of experts.

Transformers stores the weights of all experts of a layer in parameters of three dimensions. LoRA
adapts linear layers, so it adapts none of them. In some families PEFT takes the names of the
experts' former layers for these parameters, which it can adapt only without dropout and together
with the router; such names are never given to it. A router that is a linear layer isn't adapted
either unless it is named: a router that changes sends tokens to other experts, which aren't trained
to receive them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.model import families
from finetune_trainer.model.partitioned import shape_of

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Experts:
    """Holds the names of a model's experts that no adapter changes, without their layers.

    `parameters` are those of three dimensions, `weights` of `all_weights` in all, and `routers` are
    the linear layers that weigh the experts.
    """

    parameters: tuple[str, ...]
    routers: tuple[str, ...]
    weights: int
    all_weights: int

    def warning(self, adapted: Sequence[str], *, quantized: bool = False) -> str:
        """Returns what LoRA leaves unchanged, and what it adapts. With `quantized`, it adds that
        the experts of a quantized base aren't quantized."""
        share = f"{self.weights / self.all_weights:.0%}"
        return (
            f"LoRA changes no weight of the experts ({', '.join(self.parameters)}: {share} of all weights), because "
            f"they aren't linear layers; it adapts {', '.join(adapted)}; method.type full trains the experts too"
            + ("; model.quantization doesn't quantize them, for the same reason" if quantized else "")
        )


def find(base: Any) -> Experts:
    """Returns the experts of a model; without any, all names are empty."""
    shapes = {name: shape_of(parameter) for name, parameter in base.named_parameters()}
    stacked = {name: shape for name, shape in shapes.items() if len(shape) == 3 and ".experts." in name}
    return Experts(
        _last_parts(stacked),
        routers(base),
        sum(math.prod(shape) for shape in stacked.values()),
        sum(math.prod(shape) for shape in shapes.values()),
    )


def linear_layers(base: Any) -> list[str]:
    """Returns what all-linear adapts in a mixture of experts: the names of its linear layers,
    without the output layer, routers, and names that PEFT takes for experts."""
    head = base.get_output_embeddings()
    excluded = tuple(f"{part}." for part in families.parts_without_text(base))
    layers = (
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not name.startswith(excluded)
    )
    routing = routers(base)
    return [name for name in _last_parts(layers) if name not in routing and not means_experts(base, name)]


def means_experts(base: Any, target: str) -> bool:
    """Returns whether PEFT takes the name of a layer for parameters of the experts."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[target])
    try:
        convert_peft_config_for_transformers(config, model=base, conversions=None)
    except ValueError:  # it also wants the layers that are fused with this one
        return True
    return bool(config.target_parameters)


def routers(base: Any) -> tuple[str, ...]:
    """Returns the names of the linear layers that weigh experts, without their layers."""
    config = base.config.get_text_config()
    counts = {1, *(getattr(config, name, None) for name in _COUNTS)} - {None}
    if len(counts) == 1:
        return ()
    names = (
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features in counts
    )
    return tuple(name for name in _last_parts(names) if name in _ROUTER_NAMES)


def _last_parts(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
