"""MFU: the peak of a GPU by its name, and the FLOPs of a token."""

from __future__ import annotations

import pytest

from finetune_api.messages import events
from finetune_trainer.model import flops
from finetune_trainer.reporting.gpus.speed import Speed

NAMES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H20-3e": 148e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA A10-12Q": None,
    "GRID A100-40C": None,
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb": None,
    "NVIDIA A100X": None,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA H2000": None,
    "NVIDIA RTX A1000": None,
    "Tesla V100-SXM2-16GB": None,
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items(), ids=NAMES)
def test_the_peak_of_a_gpu_that_is_not_listed_is_unknown(name: str, expected: float | None) -> None:
    assert flops.peak(name) == expected


def test_flops_of_a_model_of_one_matrix() -> None:
    one = flops.Widths(matrices=100, hidden=10, vocabulary=7, layers=1, attention=10)
    assert flops.needed(one, tokens=3, labels=2, pairs=6, full=True) == 6 * (100 * 3 + 70 * 2) + 12 * 10 * 6
    assert flops.needed(one, tokens=3, labels=2, pairs=6, full=False) == 4 * (100 * 3 + 70 * 2) + 12 * 10 * 6


def _plan(flops_per_token: float | None, peak: float | None) -> events.PlanEvent:
    return events.PlanEvent(
        time=0, total_steps=9, epochs=1, rows=9, tokens_per_epoch=9, label_tokens_per_epoch=9, padding_share=0,
        parameters=1, trainable_parameters=1, flops_per_token=flops_per_token, peak_flops=peak,
    )  # fmt: skip


def _step(tokens: int, seconds: float) -> events.StepEvent:
    return events.StepEvent(
        time=0, step=1, epoch=1, loss=1, learning_rate=1, grad_norm=1, tokens=tokens, label_tokens=1, samples=1,
        seconds={"total": seconds},
    )  # fmt: skip


def test_mfu_is_the_share_of_the_peak_of_all_gpus() -> None:
    speed = Speed(gpu_count=8)
    speed.plan = _plan(32e9, 989e12)
    assert speed.mfu is None
    for _ in range(30):
        speed.add(_step(80_000, 1.0))
    assert speed.tokens_per_gpu == 10_000
    assert speed.mfu == pytest.approx(10_000 * 32e9 / 989e12)


@pytest.mark.parametrize(
    ("gpus", "plan"), [(0, _plan(1, 1)), (1, _plan(None, 1)), (1, _plan(1, None))], ids=["cpu", "model", "gpu"]
)
def test_without_a_gpu_or_a_known_peak_there_is_no_mfu(gpus: int, plan: events.PlanEvent) -> None:
    speed = Speed(gpus)
    speed.plan = plan
    speed.add(_step(10, 1.0))
    assert speed.mfu is None
