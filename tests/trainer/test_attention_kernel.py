"""The compiled attention: equal to one masked attention, the same every time, and done without where it can't be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer import attention_cpu, attention_native, kernel_build, layout

_needs_the_kernel = pytest.mark.skipif(kernel_build.library()[0] is None, reason=kernel_build.library()[1])

_ROWS = {
    "lengths around a tile, odd beginnings": ([130, 65, 64, 63, 1, 2, 17, 33], [0] * 8),
    "one long piece": ([333], [0]),
    "beginnings that several share": ([64, 30, 30, 31, 50, 150], [0, 20, 20, 29, 0, 50]),
    "a long shared beginning": ([300, 300, 290, 280, 295], [0, 287, 200, 199, 199]),
}
_SHAPES = {"9 heads, 3 for keys": (9, 3, 64), "as many": (4, 4, 32), "one for keys": (4, 1, 128), "large": (2, 2, 256),
           "odd size": (2, 1, 48)}  # fmt: skip


def _expected(row: layout.Layout, given: list[Tensor], weight: Tensor) -> list[Tensor]:
    """In float64, by one mask."""
    seen = np.zeros((row.size, row.size), dtype=bool)
    for begin, end in row.pieces:
        seen[begin:end, begin:end] = np.tril(np.ones((end - begin, end - begin), dtype=bool))
    for block in row.blocks:
        seen[block.first : block.last, block.begin : block.end] = True
    exact = [tensor.double().requires_grad_() for tensor in given]
    out = functional.scaled_dot_product_attention(*exact, attn_mask=torch.tensor(seen), scale=0.2, enable_gqa=True)
    out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, exact, weight.double())]


def _computed(row: layout.Layout, given: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    with attention_cpu.arranged(row):
        out = attention_cpu.attend(*leaves, 0.2)[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


@_needs_the_kernel
@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("rows", _ROWS)
def test_it_equals_one_masked_attention_and_gives_the_same_bits_again(rows: str, shape: str) -> None:
    lengths, shared = _ROWS[rows]
    heads, kv, size = _SHAPES[shape]
    row = layout.lay(lengths, shared).layout
    torch.manual_seed(1)
    given = [torch.randn(1, row.size, n, size).bfloat16().transpose(1, 2) for n in (heads, kv, kv)]
    weight = torch.randn(1, row.size, heads, size).bfloat16()
    assert attention_native.serves(given[0], given[1])
    found, again = (_computed(row, given, weight) for _ in range(2))
    for name, mine, exact in zip(("out", "query", "key", "value"), found, _expected(row, given, weight), strict=True):
        off = float((mine.double() - exact).norm() / exact.norm())
        assert off < 5e-3, (name, off)  # bfloat16 itself is off by up to 4e-3 a number
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@_needs_the_kernel
def test_scores_that_differ_widely_and_rows_of_one_token() -> None:
    """The softmax neither overflows nor leaves anything of a masked token."""
    row = layout.lay([200, 1, 1, 70], [0, 0, 0, 0]).layout
    torch.manual_seed(2)
    given = [100 * torch.randn(1, 2, row.size, 64).bfloat16() for _ in range(3)]
    weight = torch.randn(1, row.size, 2, 64).bfloat16()
    found, exact = _computed(row, given, weight), _expected(row, given, weight)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)
    assert torch.equal(found[0][0, 200], given[2][0, :, 200])  # a token that sees itself alone is its value
    assert float((found[0].double() - exact[0]).norm() / exact[0].norm()) < 1e-2


def test_without_a_compiler_it_says_so_and_the_products_do_the_work(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from finetune_trainer import attention_cpu, attention_native, kernel_build, layout\n"
        "row = layout.lay([40, 30], [0, 0]).layout\n"
        "q, k, v = (torch.randn(1, 2, row.size, 16).bfloat16() for _ in range(3))\n"
        "with attention_cpu.arranged(row):\n"
        "    out = attention_cpu.attend(q, k, v, 0.25)[0]\n"
        "print(bool(torch.isfinite(out).all()), attention_native.serves(q, k), kernel_build.library()[1])\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if kernel_build.lacking():
        assert done.stdout == f"True False {kernel_build.lacking()}\n"
    else:
        assert done.stdout == "True False it can't be compiled: there is no C++ compiler\n"


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([], [0, 1, 2, 3]),
        ([layout.Block(0, 5, 10, 20)], [0, 2, 3]),
        ([layout.Block(12, 15, 20, 30)], [0, 1, 3]),
        ([layout.Block(0, 5, 10, 30), layout.Block(12, 15, 20, 30)], [0, 3]),
    ],
)
def test_pieces_that_see_one_another_are_one_task(blocks: list[layout.Block], expected: list[int]) -> None:
    assert attention_native.groups([(0, 10), (10, 20), (20, 30)], blocks) == expected
