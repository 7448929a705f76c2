"""Recomputes a layer's activations in the backward pass instead of storing them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from finetune_trainer.errors import RunError
from finetune_trainer.kernels import attention_cpu, attention_cuda
from finetune_trainer.kernels.attention import chunked
from finetune_trainer.model.loading import LoadedModel

# The operators that compute attention: our own, and those of PyTorch for rows that aren't packed.
_ATTENTION = (
    *(operator._opoverload for operator in (attention_cpu.attend, attention_cuda.attend, chunked.attend)),
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def enable(loaded: LoadedModel, share: float = 1.0, *, keeps_attention: bool = False) -> None:
    """Enables the recomputation of activations in a share of the layers, with the same dropout as
    in the forward pass.

    These are the first layers: when their backward pass begins, what the others stored is freed.
    With `keeps_attention`, the output of attention is stored there, too. Raises
    RunError(InvalidConfig) if the model doesn't support it.
    """
    base = loaded.base
    if not base.supports_gradient_checkpointing:
        raise RunError(
            "InvalidConfig",
            f"training.activationCheckpointing: {type(base).__name__} can't recompute activations; set it to never, "
            "and use more memory, more processes with fsdp, or a smaller dataset.maxSequenceLength",
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if keeps_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(_ATTENTION))
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # the method's name before Transformers 5.20; GPU images may have such a version
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    layers = _layers(base)
    for layer in layers[math.ceil(share * len(layers)) :]:
        layer.gradient_checkpointing = False


def _layers(base: Any) -> list[Any]:
    """Returns the layers whose activations can be recomputed, in the order in which they run."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
