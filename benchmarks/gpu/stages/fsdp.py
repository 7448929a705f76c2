"""Measures memory and step time of one of eight FSDP ranks in full training, without the others.

The process group transfers nothing, so losses mean nothing and communication costs nothing. The
trainer's FSDP is compared with a plain use of MixedPrecisionPolicy, which gathers weights in
bfloat16 and keeps no copies.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.gpu import child, kit, timing
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune_trainer.data.batching import packed_layout
from finetune_trainer.data.batching.collator import Batch
from finetune_trainer.kernels import packed_attention
from finetune_trainer.model import activation_checkpointing
from finetune_trainer.model import loading as model_
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel import fsdp
from finetune_trainer.parallel.optimizers import OptimizerConfig
from finetune_trainer.parallel.world import World

_RANKS = 8


def run(stage: child.Stage) -> None:
    device = torch.device(stage.setting.device)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=_RANKS)
    packed_attention.register()
    shape, tokens = _shape(stage)
    for recompute in (False, True):
        for policy in (False, True):
            name = f"{'mixed precision' if policy else 'as the product'}{', recomputed' if recompute else ''}"
            with stage.guarded(name):
                _measure(stage, name, shape, tokens, device, recompute=recompute, policy=policy)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    dist.destroy_process_group()


def _shape(stage: child.Stage) -> tuple[kit.Shape, int]:
    if stage.setting.tiny or stage.setting.device != "cuda":
        return kit.TINY, 96
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return (kit.LLAMA_8B if memory > 75 else kit.LLAMA_3B if memory > 38 else kit.LLAMA_1B), 5120


class _ByPolicy:
    """FSDP2 with MixedPrecisionPolicy, layer by layer like `fsdp.FullyShardedDataParallel`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (_RANKS,))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for unit in [*model_.layers(model), model]:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        model.to_empty(device=device)
        self.model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(self, rate: float) -> float:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return 0.0


def _measure(
    stage: child.Stage, name: str, shape: kit.Shape, tokens: int, device: torch.device, *, recompute: bool, policy: bool
) -> None:
    from transformers import LlamaForCausalLM

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(
            shape.config(), dtype=torch.float32, attn_implementation=packed_attention.NAME
        )
    if recompute:
        activation_checkpointing.enable(LoadedModel(model, model, False, ""))
    strategy: Any = (
        _ByPolicy(model, device)
        if policy
        else fsdp.FullyShardedDataParallel(
            model, OptimizerConfig(0.0, 1.0), World(1, 1, _RANKS, _RANKS, device), offload=False, half=torch.bfloat16
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0.0, 0.02)
        for buffer_name, buffer in model.named_buffers():
            if "inv_freq" in buffer_name:
                buffer.copy_(torch.linspace(1.0, 1e-4, buffer.numel(), device=device))
    loss_sum = replace(LossSum.of(model, torch.bfloat16, device.type), context=lambda model: nullcontext())
    batch = _batch(shape, tokens, device)

    def step() -> None:
        with loss_sum.packed_context(batch):
            loss_sum(strategy.model, batch).backward()
        for parameter in model.parameters():  # a fake group reduces nothing, so gradients may have any value
            parameter.grad.to_local().zero_()
        strategy.step(1e-5)

    began = time.perf_counter()
    duration = timing.seconds(step, device.type, budget=3.0)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    memory = f"peak {peak / 2**30:.1f} GiB, " if peak else ""
    stage.report(
        name, "figure",
        f"{memory}{duration * 1e3:.0f} ms per step of {tokens} tokens, {shape.name} on 1 of {_RANKS} ranks",
        seconds=time.perf_counter() - began, peak_bytes=peak, seconds_a_step=duration, tokens=tokens, shape=shape.name,
    )  # fmt: skip


def _batch(shape: kit.Shape, tokens: int, device: torch.device) -> Batch:
    row = packed_layout.pack([tokens // 8] * 8, [0] * 8)
    length = row.layout.size
    keep = torch.arange(length - 1, device=device)
    return Batch(
        {
            "input_ids": torch.randint(6, shape.vocabulary, (1, length), device=device),
            "position_ids": torch.arange(length, device=device)[None] % (tokens // 8),
        },
        targets=torch.randint(6, shape.vocabulary, (len(keep),), device=device),
        chosen=torch.arange(len(keep), device=device),
        keep=keep,
        layout=row.layout,
    )


if __name__ == "__main__":
    child.main("fsdp", run)
