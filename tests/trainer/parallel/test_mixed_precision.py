"""A run in bfloat16 stores a frozen base in bfloat16 and computes every linear product in it, with
every strategy, also where autocast is CUDA's.

DeepSpeed asks for CUDA's autocast whatever the device is. Half of these runs therefore answer that
question with the CPU's autocast, which is the one that a run on a CPU uses.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.messages import events
from finetune_trainer.errors import RunError
from finetune_trainer.model import precision
from finetune_trainer.model.precision import LayerDtypes
from testkit.rows import pairs
from trainer.support import product_records
from trainer.support.product_records import ProductRecords
from trainer.support.rank_runs import FinishedRun, Job, RunningRanks, finish_each, prepare

_STRATEGIES = ("ddp", "zero1", "fsdp", "zero3", "zero2")
_ALL_LINEAR = {"target_modules": ("all-linear",)}
_CELLS: dict[str, dict[str, Any]] = {
    **{
        f"{method}, {strategy}": {"strategy": strategy, "full": method == "full"}
        for strategy in _STRATEGIES
        for method in ("full", "lora")
    },
    **{f"lora, {strategy}, all-linear": {"strategy": strategy, "lora": _ALL_LINEAR} for strategy in ("ddp", "fsdp")},
    **{
        f"{method}, {strategy}, {family}": {
            "strategy": strategy, "family": family, "full": method == "full", "lora": _ALL_LINEAR,
        }
        for method, family in (("lora", "t5"), ("full", "t5"), ("full", "gpt2"))
        for strategy in ("ddp", "fsdp", "zero3")
    },
}  # fmt: skip


def _job(folder: Path, models: dict[str, Path], cell: dict[str, Any], **options: Any) -> Job:
    training = {"max_steps": 2, "learning_rate": 1e-3 if cell.get("full") else 1e-2, **options.pop("training", {})}
    cell_options = {key: value for key, value in cell.items() if key != "family"}
    model = models[cell.get("family", "llama")]
    return prepare(
        folder, model, pairs(24), world=2, training=training, **{"dtype": "bfloat16", **cell_options, **options}
    )


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    root = tmp_path_factory.mktemp("cpu")
    jobs = {name: _job(root / str(index), models, cell) for index, (name, cell) in enumerate(_CELLS.items())}
    return finish_each(jobs, ProductRecords())


@pytest.fixture(scope="module")
def as_on_cuda(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    root = tmp_path_factory.mktemp("cuda")
    jobs = {name: _job(root / str(index), models, cell) for index, (name, cell) in enumerate(_CELLS.items())}
    return finish_each(jobs, ProductRecords(cuda_autocast=True))


@pytest.mark.parametrize("cell", _CELLS)
def test_every_linear_product_of_a_run_in_bfloat16_is_in_bfloat16(
    cell: str, on_cpu: dict[str, FinishedRun], as_on_cuda: dict[str, FinishedRun]
) -> None:
    """Review finding G1: DeepSpeed switched autocast off, so products were in float32 or failed."""
    for ended in (as_on_cuda[cell], on_cpu[cell]):
        assert {product.computed for product in product_records.read(ended.paths)} == {"bfloat16"}


@pytest.mark.parametrize("cell", _CELLS)
def test_cudas_autocast_gives_the_losses_of_the_cpus(
    cell: str, on_cpu: dict[str, FinishedRun], as_on_cuda: dict[str, FinishedRun]
) -> None:
    assert len(on_cpu[cell].losses) == 2
    assert as_on_cuda[cell].losses == on_cpu[cell].losses


@pytest.mark.parametrize("cell", [cell for cell in _CELLS if "ddp" not in cell])
def test_every_strategy_gives_the_losses_of_ddp_up_to_rounding(cell: str, on_cpu: dict[str, FinishedRun]) -> None:
    strategy = _CELLS[cell]["strategy"]
    assert on_cpu[cell].losses == pytest.approx(on_cpu[cell.replace(strategy, "ddp")].losses, rel=5e-3)


@pytest.mark.parametrize("cell", [cell for cell in _CELLS if "fsdp" not in cell])  # it shows what it has gathered
def test_a_frozen_base_is_stored_in_bfloat16_and_trained_weights_in_float32(
    cell: str, on_cpu: dict[str, FinishedRun]
) -> None:
    """Review finding G2: ZeRO-3 loaded a bfloat16 base as float32."""
    for rank in (0, 1):
        products = product_records.read(on_cpu[cell].paths, rank)
        assert {p.stored for p in products if not p.trained} == (set() if "full" in cell else {"bfloat16"})
        assert {p.stored for p in products if p.trained} == {"float32"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fsdp_has_no_copies_of_weights_in_bfloat16_besides_what_it_gathers(
    method: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    """Review finding G4: autocast's copies of all weights lived until the end of a forward pass."""
    cell = {"strategy": "fsdp", "full": method == "full"}
    job = _job(tmp_path / "job", models, cell, training={"max_steps": 2, "activation_checkpointing": "always"})
    ended = RunningRanks(job, faults=dict.fromkeys((0, 1), ProductRecords(casts=True))).wait().check()
    assert {product.casts for product in product_records.read(ended.paths)} == {0}


_HALF, _FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("decided", "expected", "stored", "computed", "message"),
    [
        pytest.param(_HALF, _HALF, {_HALF: 9}, {_HALF: 9}, "", id="a frozen base"),
        pytest.param(_HALF, _FULL, {_FULL: 9}, {_HALF: 9}, "", id="full training"),
        pytest.param(_FULL, _FULL, {_FULL: 9}, {_FULL: 9}, "", id="float32"),
        pytest.param(_HALF, _HALF, {}, {_HALF: 9}, "", id="nf4, which computes in the decided dtype"),
        pytest.param(_FULL, _FULL, {}, {}, "", id="int8, which computes in integers"),
        pytest.param(_HALF, _HALF, {_HALF: 9, _FULL: 1}, {_HALF: 9, _FULL: 1}, "", id="a router in float32"),
        pytest.param(
            _HALF, _FULL, {_FULL: 9}, {_FULL: 9}, "loaded in float32 and computed in float32", id="no autocast"
        ),
        pytest.param(
            _HALF, _HALF, {_FULL: 9}, {_HALF: 9}, "loaded in float32 and computed in bfloat16", id="a base in float32"
        ),
        pytest.param(_HALF, _HALF, {}, {_FULL: 9}, "quantized and computed in float32", id="nf4 in float32"),
        pytest.param(
            _FULL, _FULL, {_FULL: 9}, {_HALF: 9}, "loaded in float32 and computed in bfloat16", id="float32 isn't exact"
        ),
    ],
)
def test_a_run_whose_products_arent_in_the_decided_dtype_is_refused(
    decided: torch.dtype,
    expected: torch.dtype,
    stored: dict[torch.dtype, int],
    computed: dict[torch.dtype, int],
    message: str,
) -> None:
    layers = LayerDtypes(Counter(stored), Counter(computed))
    if not message:
        precision.check(decided, expected, layers, "zero2")
        return
    with pytest.raises(RunError) as raised:
        precision.check(decided, expected, layers, "zero2")
    assert raised.value.reason == "TrainingError"
    assert message in raised.value.message
    assert "zero2" in raised.value.message
    assert str(decided).removeprefix("torch.") in raised.value.message


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_a_rank_whose_layers_compute_in_float32_fails_before_the_first_step(
    strategy: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    job = _job(tmp_path / "job", models, {"strategy": strategy, "full": True})
    ended = RunningRanks(job, faults=dict.fromkeys((0, 1), ProductRecords(widened=True))).wait()
    assert set(ended.codes) == {1}
    assert ended.failure.reason == "TrainingError"
    assert f"strategy {strategy}" in ended.failure.message
    assert "computed in float32" in ended.failure.message
    assert not ended.events(events.StepEvent)
