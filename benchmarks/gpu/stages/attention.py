"""Compares the trainer's packed attention with float64, and its speed with PyTorch's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmarks.gpu import child, timing
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from finetune_trainer.data.batching import packed_layout
from finetune_trainer.kernels import attention_reference, packed_attention, packed_row

# Relative to the norm of the float64 result. The inputs are already rounded; outputs and softmax
# add as much again.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Case:
    """The dimensions of attention, and a packed row.

    `lengths` are those of its examples; `shared` are the tokens that each shares with the one
    before it. `size` is the head size.
    """

    name: str
    heads: int
    key_heads: int
    size: int
    lengths: tuple[int, ...]
    shared: tuple[int, ...] = ()

    @property
    def row(self) -> packed_layout.Layout:
        """The layout of the packed row."""
        return packed_layout.pack(self.lengths, self.shared or (0,) * len(self.lengths)).layout


_LENGTHS = (130, 65, 64, 63, 1, 17, 300)


def readers(count: int, prefix: int, own: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns lengths and shared tokens of `count` examples with a common prefix."""
    return (prefix + own,) * count, (0, *(prefix,) * (count - 1))


def cases(tiny: bool) -> list[Case]:
    """Returns the cases whose exactness is tested."""
    sizes = [Case(f"head size {size}", 8, 8, size, _LENGTHS) for size in (64, 80, 96, 128, 256)]
    grouped = [Case(f"{ratio} queries to a key", 8, 8 // ratio, 64, _LENGTHS) for ratio in (4, 8)]
    few, many = (3, 5) if tiny else (34, 300)
    prefix, own = (40, 9) if tiny else (287, 20)
    shared = [
        Case(f"{count} readers of {prefix} tokens", 8, 2, 64, *readers(count, prefix, own)) for count in (few, many)
    ]
    return (sizes[:2] + grouped[:1] if tiny else sizes + grouped) + shared


def run(stage: child.Stage) -> None:
    packed_attention.register()
    for case in cases(stage.setting.tiny):
        with stage.guarded(case.name):
            _exact(stage, case)
    with stage.guarded("odd head size"):
        _exact(stage, Case("odd head size", 4, 4, 36, _LENGTHS))
    with stage.guarded("windows"):
        _windows(stage)
    eight = (8, 96, 256) if stage.setting.tiny else (8, 776, 16384)
    for name, lengths in (
        (f"{eight[0]} x {eight[1]} tokens", (eight[1],) * eight[0]),
        (f"one row of {eight[2]}", (eight[2],)),
        (f"one row of {2 * eight[2]}", (2 * eight[2],)),
    ):
        with stage.guarded(name):
            _speed(stage, name, lengths)


def attend(row: packed_layout.Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes attention with the kernel that the trainer uses on this device.

    Inputs have shape (1, heads, length, size), the output (1, length, heads, size).
    """
    function: Callable[..., tuple[Tensor, None]] = AttentionInterface()[packed_attention.NAME]
    return function(torch.nn.Identity(), q, k, v, None, scaling=q.shape[-1] ** -0.5)[0]


def _inputs(stage: child.Stage, case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, n, case.row.size, case.size) for n in (case.heads, case.key_heads, case.key_heads)]
    return [torch.randn(shape, device=stage.setting.device).bfloat16() for shape in shapes]


def _exact(stage: child.Stage, case: Case) -> None:
    row, inputs = case.row, _inputs(stage, case)
    weight = torch.randn(1, row.size, case.heads, case.size, device=stage.setting.device).bfloat16()

    def computed() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with packed_row.computing(row):
            out = attend(row, *leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    out = attention_reference.attend(row, *exact, case.size**-0.5)
    expected = [out.detach(), *torch.autograd.grad(out, exact, weight.double())]
    once, again = computed(), computed()
    names = ("out", "query", "key", "value")
    errors = {name: timing.distance(a, b) for name, a, b in zip(names, once, expected, strict=True)}
    rounding = timing.distance(expected[3].bfloat16(), expected[3])
    same = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    worst = max(errors, key=lambda name: errors[name])
    stage.report(
        case.name, "right" if errors[worst] < _TOLERANCE else "wrong",
        f"worst error {errors[worst]:.1e} ({worst}; bfloat16 itself {rounding:.1e}); "
        f"{'bit-identical' if same else 'different bits'} when repeated",
        errors=errors, rounding=rounding, repeatable=same,
    )  # fmt: skip


def _windows(stage: child.Stage) -> None:
    """Tests whether the kernel's own sliding window is exact.

    If it is, families with sliding windows could be packed.
    """
    if stage.setting.device != "cuda":
        stage.report("windows", "skipped", "the variable-length kernel runs on CUDA only")
        return
    from torch.nn.attention import varlen

    window, lengths, heads, size = 48, (200, 64, 33), 4, 64
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, size, device="cuda").bfloat16() for _ in range(3))
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    output = varlen.varlen_attn(
        q, k, v, borders, borders, max(lengths), max(lengths), scale=size**-0.5, window_size=(window - 1, 0)
    )
    positions = torch.arange(total, device="cuda")
    example = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to("cuda")
    distance = positions[:, None] - positions[None]
    mask = (example[:, None] == example[None]) & (distance >= 0) & (distance < window)
    wide = (tensor.double().transpose(0, 1)[None] for tensor in (q, k, v))
    exact = functional.scaled_dot_product_attention(*wide, attn_mask=mask, scale=size**-0.5)[0].transpose(0, 1)
    error = timing.distance(output, exact)
    stage.report(
        "windows", "right" if error < _TOLERANCE else "wrong", f"error {error:.1e} with window_size", error=error
    )


def _speed(stage: child.Stage, name: str, lengths: tuple[int, ...]) -> None:
    """Times forward and backward of a packed row, and of PyTorch's kernels on equal rows."""
    heads, key_heads, size = (4, 2, 32) if stage.setting.tiny else (32, 8, 128)
    case = Case(name, heads, key_heads, size, lengths)
    row, inputs = case.row, _inputs(stage, case)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    flops = 12 * heads * size * sum(n * (n + 1) / 2 for n in lengths)

    def packed() -> None:
        with packed_row.computing(row):
            out = attend(row, *leaves)
            out.backward(torch.ones_like(out))

    rates = {"ours": flops / timing.seconds(packed, stage.setting.device)}
    shape = (len(lengths), heads, lengths[0], size)
    q, k, v = (torch.randn(shape, device=stage.setting.device).bfloat16().requires_grad_() for _ in range(3))

    def plain() -> None:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.backward(torch.ones_like(out))

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                rates[backend.name.lower()] = flops / timing.seconds(plain, stage.setting.device)
        except RuntimeError:
            continue
    text = ", ".join(f"{kind} {timing.rate(rate, 'FLOP/s')}" for kind, rate in rates.items())
    stage.report(name, "figure", f"forward and backward: {text}", flops_per_second=rates)


if __name__ == "__main__":
    child.main("attention", run)
