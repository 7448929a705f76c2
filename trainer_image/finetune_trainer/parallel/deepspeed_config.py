"""Provides DeepSpeed's configuration and environment, and splits a model while it is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from finetune_api.spec.hardware import Offload
from finetune_trainer.host_memory import without_fragments
from finetune_trainer.parallel.limits import ZERO_BUCKET
from finetune_trainer.parallel.optimizers import OptimizerConfig
from finetune_trainer.parallel.world import World

Stage = Literal[1, 2, 3]
"""A stage of ZeRO; see `deepspeed`."""


@dataclass(frozen=True)
class ZeroOptions:
    """The stage of ZeRO, what is offloaded, the half-precision format in which products are
    computed, or None for that of the weights, and the device that computes."""

    stage: Stage
    offload: Offload = "none"
    half: torch.dtype | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def calls_engine(self) -> bool:
        """Whether forward and backward passes run through DeepSpeed's engine."""
        return self.stage > 1

    @property
    def fused_optimizer(self) -> bool:
        """Whether AdamW updates all weights in one kernel.

        On a GPU's host it replaces a loop over tensors, which is slow for the weights of a large
        model. CPU runs keep the loop, whose results differ in the last bit for large tensors.
        """
        return self.device == "cuda" and self.offload != "none"


def prepare_environment(device: str) -> None:
    """Sets the environment variables that DeepSpeed reads. Call it before DeepSpeed is first
    imported."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]  # otherwise, DeepSpeed runs numactl


def configuration(options: ZeroOptions, config: OptimizerConfig) -> dict[str, Any]:
    """Returns DeepSpeed's own configuration.

    Its number of gradient accumulation steps is 1, since the training loop counts micro-batches
    itself. The engine switches off an autocast that it doesn't know of, so it opens its own. The
    empty list keeps gradients in float32 when they are sent.
    """
    stage, offload = options.stage, options.offload
    host = {"device": "cpu", "pin_memory": options.device == "cuda"}
    offloading = {
        **({"offload_optimizer": host} if offload != "none" else {}),
        **({"offload_param": host} if offload == "parameters" else {}),
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            # Stage 3 then gathers weights on a stream of its own, while other layers compute. Its
            # buckets of gradients must be contiguous.
            "overlap_comm": stage == 3 and options.device == "cuda",
            "contiguous_gradients": stage > 1,  # needs DeepSpeed's hooks, which stage 1 doesn't use
            "reduce_bucket_size": ZERO_BUCKET,
            "allgather_bucket_size": ZERO_BUCKET,
            **offloading,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        **({"torch_autocast": _autocast(options.half)} if options.half and options.calls_engine else {}),
    }


def _autocast(dtype: torch.dtype) -> dict[str, Any]:
    return {"enabled": True, "dtype": str(dtype).removeprefix("torch."), "lower_precision_safe_modules": []}


@contextmanager
def split_while_loading(options: ZeroOptions | None, stored: torch.dtype) -> Iterator[None]:
    """Splits a model over the ranks while it is loaded inside, in stage 3, with its weights stored
    in the dtype `stored`. In other stages, nothing happens.

    Each weight is split as soon as rank 0 has read it, so no rank ever holds the full model.
    """
    if options is None or options.stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    skip_compiling_ops()
    settings = configuration(options, OptimizerConfig(0.0, 0.0))
    settings["bf16"] = {"enabled": stored == torch.bfloat16}  # whatever `from_pretrained` is asked for
    # Transformers has only a weak reference to it, so it has to be kept alive here.
    config = HfDeepSpeedConfig(settings)
    try:
        with without_fragments():
            yield
    finally:
        unset_hf_deepspeed_config()
        del config


@contextmanager
def uncached() -> Iterator[None]:
    """Makes an autocast that is opened inside convert a weight each time that it is used."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def skip_compiling_ops() -> None:
    """Keeps DeepSpeed from compiling a shared-memory all-reduce on the CPU.

    Compilation would write to the home directory for half a minute, which isn't possible in a
    read-only pod, and the compiled all-reduce couldn't reach another pod.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_world(accelerator: Any, world: World) -> None:
    """Raises RuntimeError if Accelerate sees a different world, in which all ranks would train on
    the same rows."""
    ours, theirs = (world.size, world.rank), (accelerator.num_processes, accelerator.process_index)
    if theirs != ours:
        raise RuntimeError(f"Accelerate has world size and rank {theirs} instead of {ours}")
