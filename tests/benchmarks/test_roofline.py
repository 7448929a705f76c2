"""The roofline of the trainer on a GPU is that of the committed result, and a step has few kernels,
no needless float32 product, and nothing for which the host waits."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from benchmarks.gpu.roofline import hardware
from benchmarks.gpu.roofline.__main__ import RESULTS, header, row
from benchmarks.gpu.roofline.cells import CELLS, Cell
from benchmarks.gpu.roofline.kernels import Kernel, Recorder
from benchmarks.gpu.roofline.model import Roofline, roofline

_TOLERANCE = 0.02
_MAX_KERNELS_PER_LAYER = {
    "lora-qv": 131,
    "lora-all-linear": 211,
    "lora-all-linear-recompute": 294,
    "lora-qv-32k": 181,
    "lora-qv-32k-selective": 90,
    "full": 115,
    "full-1b": 142,
    "lora-qv-1b": 131,
    "qlora-qv": 151,
}
_MAX_HEAD_SHARE = {"lora-qv": 0.065, "full": 0.065}

cells = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
_roofline = cache(roofline)


@cache
def _committed() -> dict[str, dict[str, Any]]:
    return {record["cell"]: record for record in json.loads(RESULTS.read_text())}


@cells
def test_mfu_is_that_of_the_committed_result(cell: Cell) -> None:
    """`make roofline` writes it. A slower trainer needs a reason, a faster one a new result."""
    assert _roofline(cell).mfu == pytest.approx(_committed()[cell.name]["mfu"], rel=_TOLERANCE)


@cells
def test_a_step_has_few_kernels_and_no_float32_product_and_the_host_never_waits(cell: Cell) -> None:
    result = _roofline(cell)
    assert result.kernels_per_layer <= _MAX_KERNELS_PER_LAYER[cell.name]
    assert result.wide_products == 0
    assert result.host_waits == 0
    assert result.share("head") <= _MAX_HEAD_SHARE.get(cell.name, 1.0)


def test_the_committed_result_has_every_cell_and_its_limits() -> None:
    assert set(_committed()) == {cell.name for cell in CELLS}
    for record in _committed().values():
        assert sum(limit["share"] for limit in record["limits"]) == pytest.approx(1, abs=1e-3)


def test_a_row_of_the_table_has_the_columns_of_its_head() -> None:
    result = Roofline(CELLS[0], {"matmul": 0.1, "head": 0.1}, {"matmul": 1e9, "head": 1e9}, 10, 330, 0, 0)
    assert row(result).count("|") == header().splitlines()[0].count("|")
    assert result.share("head") == 0.5


@torch.library.custom_op("roofline_test::scaled", mutates_args=())
def _scaled(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return values.mul(2).add(1).mul(factor)


def test_a_custom_operator_is_one_kernel_that_reads_its_inputs_and_writes_its_outputs_once() -> None:
    values, factor = torch.zeros(8, 4), torch.zeros(4)
    with Recorder(pairs=0, vocabulary=999) as recorder:
        _scaled(values, factor)
    assert [(kernel.name, kernel.bytes) for kernel in recorder.kernels] == [("roofline_test.scaled", 2 * 128 + 16)]


def test_what_a_kernel_costs_is_counted_from_its_shapes() -> None:
    a, b = torch.zeros(6, 80), torch.zeros(80, 70)
    with Recorder(pairs=0, vocabulary=70) as recorder:
        a @ b[:, :65]
        a.t()
        a.copy_(torch.zeros(()).expand(6, 80))
        b.index_select(0, torch.zeros(3, dtype=torch.int64))
        torch.addmm(a[:, :65], a, b[:, :65], out=torch.empty(6, 65))
    product, _, copied, _, selected, added = recorder.kernels
    assert (product.flops, product.kind) == (2 * 6 * 80 * 65, "adapters")
    assert copied.bytes == 4 * (480 + 1)
    assert (selected.bytes, selected.kind) == (2 * 4 * 3 * 70, "head")
    assert (added.flops, added.bytes) == (product.flops, product.bytes + 4 * 6 * 65)


@pytest.mark.parametrize(
    ("kernel", "seconds"),
    [
        pytest.param(Kernel("mm", "matmul", 7e12, 0, torch.bfloat16), 0.01, id="limited by products"),
        pytest.param(Kernel("mm", "matmul", 5.5e12, 0, torch.float32), 0.1, id="float32"),
        pytest.param(Kernel("add", "elementwise", 0, 3e9, torch.bfloat16), 1e-3, id="limited by bandwidth"),
        pytest.param(Kernel("add", "elementwise", 0, 8, torch.bfloat16), 2.5e-6, id="limited by its launch"),
        pytest.param(
            Kernel("varlen", "attention", 7e12, 0, torch.bfloat16, backward=True), 0.01 / 0.43, id="attention"
        ),
    ],
)
def test_the_longest_of_three_times_is_a_kernels_time(kernel: Kernel, seconds: float) -> None:
    assert hardware.seconds(kernel) == pytest.approx(seconds)
