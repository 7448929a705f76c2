"""The compiled attention equals one masked attention, gives the same bits every time, and is
replaced if it can't be compiled."""

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

from finetune_trainer.data.batching import packed_layout
from finetune_trainer.kernels import attention_avx512, attention_cpu, kernel_build, packed_row

_ROWS = {
    "lengths around a tile, odd offsets": ([130, 65, 64, 63, 1, 2, 17, 33], [0] * 8),
    "one long segment": ([333], [0]),
    "prefixes that several share": ([64, 30, 30, 31, 50, 150], [0, 20, 20, 29, 0, 50]),
    "a long shared prefix": ([300, 300, 290, 280, 295], [0, 287, 200, 199, 199]),
}
_SHAPES = {"9 heads, 3 for keys": (9, 3, 64), "as many": (4, 4, 32), "one for keys": (4, 1, 128), "large": (2, 2, 256),
           "odd size": (2, 1, 48)}  # fmt: skip


def _expected(row: packed_layout.Layout, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of query, key and value in float64, computed with one
    mask."""
    visible = np.zeros((row.size, row.size), dtype=bool)
    for begin, end in row.segments:
        visible[begin:end, begin:end] = np.tril(np.ones((end - begin, end - begin), dtype=bool))
    for block in row.blocks:
        visible[block.first : block.last, block.begin : block.end] = True
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    out = functional.scaled_dot_product_attention(*exact, attn_mask=torch.tensor(visible), scale=0.2, enable_gqa=True)
    out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, exact, weight.double())]


def _computed(row: packed_layout.Layout, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Returns the output of `attention_cpu` and the gradients of query, key and value."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with packed_row.computing(row):
        out = attention_cpu.attend(*leaves, 0.2)[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("rows", _ROWS)
def test_compiled_attention_equals_one_masked_attention_and_repeats_to_the_bit(
    rows: str, shape: str, kernel: str
) -> None:
    lengths, shared = _ROWS[rows]
    heads, kv, size = _SHAPES[shape]
    row = packed_layout.pack(lengths, shared).layout
    torch.manual_seed(1)
    inputs = [torch.randn(1, row.size, n, size).bfloat16().transpose(1, 2) for n in (heads, kv, kv)]
    weight = torch.randn(1, row.size, heads, size).bfloat16()
    assert attention_avx512.supports(inputs[0], inputs[1])
    computed, repeated = (_computed(row, inputs, weight) for _ in range(2))
    for name, tensor, exact in zip(
        ("out", "query", "key", "value"), computed, _expected(row, inputs, weight), strict=True
    ):
        error = float((tensor.double() - exact).norm() / exact.norm())
        assert error < 5e-3, (name, error)  # a number in bfloat16 has a relative error of up to 4e-3
    assert all(torch.equal(one, other) for one, other in zip(computed, repeated, strict=True))


def test_attention_is_exact_with_widely_different_scores_and_rows_of_one_token(kernel: str) -> None:
    """The softmax neither overflows nor includes anything of a masked token."""
    row = packed_layout.pack([200, 1, 1, 70], [0, 0, 0, 0]).layout
    torch.manual_seed(2)
    inputs = [100 * torch.randn(1, 2, row.size, 64).bfloat16() for _ in range(3)]
    weight = torch.randn(1, row.size, 2, 64).bfloat16()
    computed, exact = _computed(row, inputs, weight), _expected(row, inputs, weight)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in computed)
    # The output of a token that attends only to itself is its value.
    assert torch.equal(computed[0][0, 200], inputs[2][0, :, 200])
    assert float((computed[0].double() - exact[0]).norm() / exact[0].norm()) < 1e-2


def test_without_a_compiler_a_reason_is_returned_and_matrix_products_are_used(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from finetune_trainer.data.batching import packed_layout\n"
        "from finetune_trainer.kernels import attention_avx512, attention_cpu, kernel_build, packed_row\n"
        "row = packed_layout.pack([40, 30], [0, 0]).layout\n"
        "q, k, v = (torch.randn(1, 2, row.size, 16).bfloat16() for _ in range(3))\n"
        "with packed_row.computing(row):\n"
        "    out = attention_cpu.attend(q, k, v, 0.25)[0]\n"
        "print(bool(torch.isfinite(out).all()), attention_avx512.supports(q, k), kernel_build.library()[1])\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    if kernel_build.unmet_requirement():
        assert result.stdout == f"True False {kernel_build.unmet_requirement()}\n"
    else:
        assert result.stdout == "True False it can't be compiled: there is no C++ compiler\n"


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([], [0, 1, 2, 3]),
        ([packed_layout.SharedBlock(0, 5, 10, 20)], [0, 2, 3]),
        ([packed_layout.SharedBlock(12, 15, 20, 30)], [0, 1, 3]),
        ([packed_layout.SharedBlock(0, 5, 10, 30), packed_layout.SharedBlock(12, 15, 20, 30)], [0, 3]),
    ],
)
def test_segments_that_attend_to_each_other_are_one_task(
    blocks: list[packed_layout.SharedBlock], expected: list[int]
) -> None:
    assert attention_avx512.group_starts([(0, 10), (10, 20), (20, 30)], blocks) == expected
