"""Runs DeepSpeed's own engine on tensors without values, as one of several ranks, and measures the
memory of that rank.

The engine is the trainer's (`DeepSpeedZero`), on a process group whose messages arrive nowhere.
Only what needs values is answered here: numbers that the host asks for, and a comparison of lists
with those of the other ranks. A process can't leave DeepSpeed's state behind, so each measurement
needs its own (`forked_ranks`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_trainer.kernels import packed_attention
from finetune_trainer.kernels.cuda import lora as kernels_of_adapters
from finetune_trainer.kernels.cuda import modules
from finetune_trainer.model import activation_checkpointing
from finetune_trainer.model import lora as adapters
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel import deepspeed_config
from finetune_trainer.parallel.deepspeed import DeepSpeedZero
from finetune_trainer.parallel.deepspeed_config import Stage, ZeroOptions
from finetune_trainer.parallel.optimizers import OptimizerConfig
from finetune_trainer.parallel.world import World
from trainer.support import fake_step
from trainer.support.fake_step import LiveBytes, Step

_MICRO_BATCHES = (1, 2)
"""How many micro-batches the steps have. In the second step, moments and gradients exist."""


@dataclass(frozen=True)
class ZeroStep:
    """Describes a step that `ranks` ranks do in this stage of ZeRO."""

    step: Step
    stage: Stage
    ranks: int


def write_peak(zero: ZeroStep, file: Path) -> None:
    """Writes the most bytes that are in use in the second step: weights, moments, gradients,
    DeepSpeed's buffers and activations. Call it in a process of its own."""
    file.write_text(str(_peak_bytes(zero)))


def _peak_bytes(zero: ZeroStep) -> int:
    packed_attention.register()
    with _rank_of(zero.ranks), fake_step.cuda_branches(), FakeTensorMode(allow_non_fake_inputs=True):
        live = _ValuedBytes(iter(()))
        with live, live.resizable():
            loaded, strategy = _engine(zero)
            loss_sum = LossSum.of(loaded.base, torch.bfloat16, "cpu")
            loss_sum = replace(loss_sum, context=strategy.autocast)
            batch = fake_step.batch(zero.step.tokens, zero.step.rows)
            for micro_batches in _MICRO_BATCHES:
                live.peak = live.current
                for number in range(micro_batches):
                    last = number + 1 == micro_batches
                    with strategy.accumulate(last), loss_sum.packed_context(batch):
                        strategy.backward(loss_sum(strategy.model, batch) * zero.ranks, last)
                strategy.step(1e-3)
        return live.peak


def _engine(zero: ZeroStep) -> tuple[LoadedModel, DeepSpeedZero]:
    """Loads, adapts and wraps a model as `training.load` does it, and replaces its modules."""
    step, whole = zero.step, zero.stage != 3
    config = LlamaConfig(**dict(step.shape), attn_implementation=packed_attention.NAME)
    options = ZeroOptions(zero.stage, half=torch.bfloat16)
    stored = torch.bfloat16 if step.lora else torch.float32
    with deepspeed_config.split_while_loading(options, stored):
        base = LlamaForCausalLM._from_config(config, dtype=stored)
    loaded = LoadedModel(base, base, False, "")
    if step.lora is not None:
        base.requires_grad_(False)
        loaded = adapters.adapt(loaded, step.lora, 1)
    if step.recompute:
        again = step.recompute
        activation_checkpointing.enable(loaded, again.share, keeps_attention=again.keeps_attention)
    world = World(0, 0, zero.ranks, zero.ranks, torch.device("cpu"))
    strategy = DeepSpeedZero(loaded.model, OptimizerConfig(0.0, 1.0), world, options)
    with fake_step.always_equal():
        modules.replace_modules(base, torch.device("cpu"), sums=whole)
    if whole:
        kernels_of_adapters.replace_modules(loaded.model)
    loaded.model.train()
    return loaded, strategy


class _ValuedBytes(LiveBytes):
    """Also answers the host when it asks for a value: 1 for a norm, and no for a question."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else False
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _rank_of(ranks: int) -> Iterator[None]:
    """Makes this process one of several ranks, whose messages arrive nowhere."""
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator

    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed_config.prepare_environment("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with ExitStack() as stack:
        for module in (partition_parameters, partitioned_param_coordinator):
            stack.enter_context(mock.patch.object(module, "assert_ints_same_as_other_ranks"))
        yield
