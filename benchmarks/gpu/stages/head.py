"""Tests whether the chunked output head is exact, and which chunk size is fastest.

It also counts how often the host waits for the GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from benchmarks.gpu import child, timing
from torch import Tensor
from torch.nn import functional

from finetune_trainer.kernels import chunked_cross_entropy, sizes
from finetune_trainer.kernels.cuda import softmax

_SYNC = "called a synchronizing CUDA operation"
_CHUNKS = (32, 64, 128, 256, 512)  # MiB of logits at a time


def run(stage: child.Stage) -> None:
    for full in (False, True):
        name = "full training" if full else "LoRA"
        with stage.guarded(f"exact, {name}"):
            _exact(stage, name, full=full)
        for chunk in _CHUNKS[:2] if stage.setting.tiny else _CHUNKS:
            with stage.guarded(f"{name}, {chunk} MiB"):
                _speed(stage, name, chunk, full=full)
    with stage.guarded("Liger's head"):
        _liger(stage)


def _sizes(stage: child.Stage) -> tuple[int, int, int]:
    """Returns positions, width and vocabulary size."""
    return (64, 32, 512) if stage.setting.tiny else (6144, 4096, 128256)


def _inputs(
    stage: child.Stage, positions: int, *, full: bool
) -> tuple[chunked_cross_entropy.ChunkedHead, torch.nn.Linear, Tensor, chunked_cross_entropy.Targets]:
    _, width, vocabulary = _sizes(stage)
    torch.manual_seed(0)
    with torch.device(stage.setting.device):
        layer = torch.nn.Linear(width, vocabulary, bias=False)
        hidden = torch.randn(1, positions, width).bfloat16()
        targets = torch.randint(vocabulary, (positions,))
        indices = torch.arange(positions)
    layer.requires_grad_(full)
    if not full:
        layer.to(torch.bfloat16)
    return (
        chunked_cross_entropy.ChunkedHead(layer),
        layer,
        hidden,
        chunked_cross_entropy.Targets(targets, indices, None, torch.bfloat16, sorted_chosen=np.arange(positions)),
    )


def _work(
    head: chunked_cross_entropy.ChunkedHead,
    layer: torch.nn.Linear,
    hidden: Tensor,
    targets: chunked_cross_entropy.Targets,
) -> Callable[[], Tensor]:
    leaf = hidden.clone().requires_grad_()

    def work() -> Tensor:
        leaf.grad = layer.weight.grad = None
        with head.computing(targets):
            loss: Tensor = layer(leaf).sum()
        loss.backward()
        return loss

    work.leaf = leaf  # type: ignore[attr-defined]
    return work


def _exact(stage: child.Stage, name: str, *, full: bool) -> None:
    head, layer, hidden, targets = _inputs(stage, 48 if stage.setting.tiny else 256, full=full)
    work = _work(head, layer, hidden, targets)
    loss = work()
    leaf = hidden.double().requires_grad_()
    weight = layer.weight.detach().to(torch.bfloat16).double().requires_grad_()
    exact = functional.cross_entropy((leaf @ weight.t())[0], targets.targets, reduction="sum")
    exact.backward()
    errors = {
        "loss": abs(float(loss.detach()) / float(exact.detach()) - 1),
        "hidden": timing.distance(work.leaf.grad, leaf.grad),  # type: ignore[attr-defined, arg-type]
    }
    if full:
        errors["weight"] = timing.distance(layer.weight.grad, weight.grad)  # type: ignore[arg-type]
    right = errors["loss"] < 1e-3 and max(errors.values()) < 1e-2
    text = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
    stage.report(f"exact, {name}", "right" if right else "wrong", f"errors: {text}", errors=errors)


def _speed(stage: child.Stage, name: str, chunk: int, *, full: bool) -> None:
    device = stage.setting.device
    positions, width, vocabulary = _sizes(stage)
    head, layer, hidden, targets = _inputs(stage, positions, full=full)
    tables = sizes.CHUNK_BYTES, sizes.UNFUSED_CHUNK_BYTES, sizes.SOFTMAX_BYTES
    before = [table[device] for table in tables]
    usual, usual_parts = before[0], before[2]
    sizes.CHUNK_BYTES[device] = sizes.UNFUSED_CHUNK_BYTES[device] = chunk << 20
    sizes.SOFTMAX_BYTES[device] = max(usual_parts, 2 * chunk << 20)
    try:
        work = _work(head, layer, hidden, targets)
        duration = timing.seconds(work, device)
        peak = timing.peak_bytes(work, device)
        syncs = _syncs(work, device)
    finally:
        for table, size in zip(tables, before, strict=True):
            table[device] = size
    flops = 2 * positions * width * vocabulary * (3 if full else 2)
    mark = ", the trainer's size" if chunk << 20 == usual else ""
    stage.report(
        f"{name}, {chunk} MiB", "figure",
        f"{duration * 1e3:.2f} ms for {positions} positions ({timing.rate(flops / duration, 'FLOP/s')})"
        + ("" if syncs is None else f", {peak / 2**20:.0f} MiB more, {syncs} host syncs") + mark,
        seconds_each=duration, flops_per_second=flops / duration, peak_bytes=peak, host_syncs=syncs,
        fused=softmax.supports(torch.device(device), torch.bfloat16),
    )  # fmt: skip


def _syncs(work: Callable[[], object], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum(_SYNC in str(warning.message) for warning in caught)


def _liger(stage: child.Stage) -> None:
    """Times Liger Kernel's fused linear cross-entropy on the same inputs, for comparison."""
    if stage.setting.device != "cuda":
        stage.report("Liger's head", "skipped", "its kernels are Triton's and need a GPU")
        return
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        stage.report("Liger's head", "skipped", f"liger-kernel isn't here: {error}")
        return
    for full in (False, True):
        _, layer, hidden, targets = _inputs(stage, _sizes(stage)[0], full=full)
        weight = layer.weight.detach().to(torch.bfloat16).requires_grad_(full)
        leaf = hidden[0].clone().requires_grad_()
        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

        def work(loss=loss, weight=weight, leaf=leaf, targets=targets) -> None:  # type: ignore[no-untyped-def]
            leaf.grad = weight.grad = None
            loss(weight, leaf, targets.targets).backward()

        duration, peak = timing.seconds(work, "cuda"), timing.peak_bytes(work, "cuda")
        name = "full training" if full else "LoRA"
        stage.report(
            f"Liger's head, {name}", "figure", f"{duration * 1e3:.2f} ms, {peak / 2**20:.0f} MiB more",
            seconds_each=duration, peak_bytes=peak,
        )  # fmt: skip


if __name__ == "__main__":
    child.main("head", run)
