"""Recomputes a layer's activations in the backward pass instead of storing them."""

from __future__ import annotations

from finetune_trainer.errors import RunError
from finetune_trainer.model.loading import LoadedModel


def enable(loaded: LoadedModel) -> None:
    """Enables the recomputation of every layer's activations, with the same dropout as in the
    forward pass.

    Raises RunError(InvalidConfig) if the model doesn't support it.
    """
    base = loaded.base
    if not base.supports_gradient_checkpointing:
        raise RunError(
            "InvalidConfig",
            f"training.activationCheckpointing: {type(base).__name__} can't recompute activations; set it to never, "
            "and use more memory, more processes with fsdp, or a smaller dataset.maxSequenceLength",
        )
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # the method's name before Transformers 5.20; GPU images may have such a version
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
