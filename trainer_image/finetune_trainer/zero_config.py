"""What DeepSpeed is told: its configuration and environment, and how a model is loaded that it is to split.

Called by `zero`, and by those who load models or touch weights that may be split.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from finetune_trainer.footprint import ZERO_BUCKET
from finetune_trainer.optimizers import Recipe

Stage = Literal[1, 2, 3]
Offload = Literal["none", "optimizer", "parameters"]


def prepare_environment(device: str) -> None:
    """Before the first import of deepspeed."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]  # else DeepSpeed asks a program called numactl


def configuration(stage: Stage, recipe: Recipe, offload: Offload = "none") -> dict[str, Any]:
    """DeepSpeed's own configuration. The loop counts micro-batches itself, hence accumulation 1."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    away = {
        **({"offload_optimizer": host} if offload != "none" else {}),
        **({"offload_param": host} if offload == "parameters" else {}),
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": stage > 1,  # in 1 it would compute with hooks, and here DeepSpeed has none
            "reduce_bucket_size": ZERO_BUCKET,
            "allgather_bucket_size": ZERO_BUCKET,
            **away,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


@contextmanager
def split_while_loading(stage: Stage | None, offload: Offload = "none") -> Iterator[None]:
    """In stage 3 a weight is split over the ranks as soon as rank 0 has read it: no rank ever holds the whole model."""
    if stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    without_compiling()
    splitting = configuration(stage, Recipe(0.0, 0.0), offload)
    config = HfDeepSpeedConfig(splitting)  # only lives as long as somebody holds it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


@contextmanager
def loading_whole() -> Iterator[None]:
    """A model that one rank loads in here is its own: Accelerate makes Transformers split whatever is loaded later."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def whole(parameter: Any) -> AbstractContextManager[Any]:
    """Inside, a weight that was split is whole and may be written (rank 0's copy counts)."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return gathered


def without_compiling() -> None:
    """On the CPU DeepSpeed would compile a shared-memory all-reduce into the home directory: half a minute
    that a read-only pod can't spend, for something that can't reach another pod."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
