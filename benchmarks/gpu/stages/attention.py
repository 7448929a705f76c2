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
    before it. `size` is the head size. `window` is 0 without a sliding window.
    """

    name: str
    heads: int
    key_heads: int
    size: int
    lengths: tuple[int, ...]
    shared: tuple[int, ...] = ()
    window: int = 0
    softcap: float = 0.0
    has_sinks: bool = False

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
    options = [
        Case("odd head size", 4, 4, 36, _LENGTHS),
        Case("windows", 8, 2, 64, *readers(few, prefix, own), window=48),
        Case("sinks", 8, 2, 64, *readers(few, prefix, own), window=48, has_sinks=True),
        Case("soft cap", 8, 2, 64, _LENGTHS, softcap=2.0),
    ]
    return (sizes[:2] + grouped[:1] if tiny else sizes + grouped) + shared + options


def run(stage: child.Stage) -> None:
    packed_attention.register()
    for case in cases(stage.setting.tiny):
        with stage.guarded(case.name):
            _exact(stage, case)
    eight = (8, 96, 256) if stage.setting.tiny else (8, 776, 16384)
    for name, lengths in (
        (f"{eight[0]} x {eight[1]} tokens", (eight[1],) * eight[0]),
        (f"one row of {eight[2]}", (eight[2],)),
        (f"one row of {2 * eight[2]}", (2 * eight[2],)),
    ):
        with stage.guarded(name):
            _speed(stage, name, lengths)


def attend(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Computes attention with the kernel that the trainer uses on this device.

    Inputs have shape (1, heads, length, size), the output (1, length, heads, size), and sinks
    (heads,).
    """
    function: Callable[..., tuple[Tensor, None]] = AttentionInterface()[packed_attention.NAME]
    options = {"sliding_window": case.window, "softcap": case.softcap, "s_aux": sinks}
    return function(torch.nn.Identity(), q, k, v, None, scaling=q.shape[-1] ** -0.5, **options)[0]


def _inputs(stage: child.Stage, case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, n, case.row.size, case.size) for n in (case.heads, case.key_heads, case.key_heads)]
    inputs = [torch.randn(shape, device=stage.setting.device).bfloat16() for shape in shapes]
    return [*inputs, torch.randn(case.heads, device=stage.setting.device)] if case.has_sinks else inputs


def _exact(stage: child.Stage, case: Case) -> None:
    row, inputs = case.row, _inputs(stage, case)
    weight = torch.randn(1, row.size, case.heads, case.size, device=stage.setting.device).bfloat16()

    def computed() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with packed_row.computing(row):
            out = attend(case, *leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    out = attention_reference.attend(
        row, *exact[:3], case.size**-0.5, sinks=exact[3] if case.has_sinks else None, window=case.window,
        softcap=case.softcap,
    )  # fmt: skip
    expected = [out.detach(), *torch.autograd.grad(out, exact, weight.double())]
    once, again = computed(), computed()
    names = ("out", "query", "key", "value", "sinks")[: len(once)]
    errors = {name: timing.distance(a, b) for name, a, b in zip(names, once, expected, strict=True)}
    rounding = timing.distance(expected[3].bfloat16(), expected[3])
    # The kernel itself adds the gradient of the query up in an order that varies.
    differing = [name for name, a, b in zip(names, once, again, strict=True) if not torch.equal(a, b)]
    worst = max(errors, key=lambda name: errors[name])
    stage.report(
        case.name, "right" if errors[worst] < _TOLERANCE else "wrong",
        f"worst error {errors[worst]:.1e} ({worst}; bfloat16 itself {rounding:.1e}); "
        f"{'different bits of ' + ', '.join(differing) if differing else 'bit-identical'} when repeated",
        errors=errors, rounding=rounding, repeatable=not {"key", "value"} & set(differing),
    )  # fmt: skip


def _speed(stage: child.Stage, name: str, lengths: tuple[int, ...]) -> None:
    """Times forward and backward of a packed row, and of PyTorch's kernels on equal rows."""
    heads, key_heads, size = (4, 2, 32) if stage.setting.tiny else (32, 8, 128)
    case = Case(name, heads, key_heads, size, lengths)
    row, inputs = case.row, _inputs(stage, case)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    flops = 12 * heads * size * sum(n * (n + 1) / 2 for n in lengths)

    def packed() -> None:
        with packed_row.computing(row):
            out = attend(case, *leaves)
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
