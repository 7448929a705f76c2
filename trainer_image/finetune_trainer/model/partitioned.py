"""Gives access to weights that DeepSpeed's ZeRO-3 has partitioned over the ranks: their shapes and
the full tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


def shape_of(parameter: Any) -> Any:
    """Returns the shape of the full parameter, whether or not it is partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def loading_unpartitioned() -> Iterator[None]:
    """Makes a model that is loaded inside belong entirely to this rank.

    Accelerate makes Transformers partition whatever is loaded after DeepSpeed has been set up.
    """
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def gathered(parameter: Any) -> AbstractContextManager[Any]:
    """Makes a partitioned parameter the full tensor inside, where it may be changed. Only rank 0's
    changes take effect.

    All ranks must enter it together.
    """
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return context
