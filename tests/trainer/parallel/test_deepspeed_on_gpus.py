"""DeepSpeed's configuration on GPUs: weights are gathered while layers compute, and the host's
AdamW is one kernel. A run on the CPU keeps its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from finetune_api.spec.hardware import Offload
from finetune_trainer.parallel import optimizers
from finetune_trainer.parallel.deepspeed_config import Stage, ZeroOptions, configuration
from finetune_trainer.parallel.optimizers import OptimizerConfig
from testkit.rows import pairs
from trainer.support.rank_runs import CheckedRuns, Job, finish_each, prepare

_OFFLOADED: dict[str, tuple[str, str]] = {
    "zero2": ("zero2", "optimizer"),
    "zero3": ("zero3", "optimizer"),
}


@dataclass(frozen=True)
class FusedAdamW:
    """Makes every AdamW of a rank's process the fused one, as on a GPU's host."""

    def install(self) -> None:
        original = torch.optim.AdamW.__init__

        def fused(optimizer: Any, *arguments: Any, **options: Any) -> None:
            original(optimizer, *arguments, **{**options, "fused": True})

        torch.optim.AdamW.__init__ = fused  # type: ignore[method-assign]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_3_overlaps_on_gpus(device: Literal["cpu", "cuda"], stage: Stage) -> None:
    zero = configuration(ZeroOptions(stage, device=device), OptimizerConfig(0.0, 1.0))["zero_optimization"]
    assert zero["overlap_comm"] is (device == "cuda" and stage == 3)
    assert zero["contiguous_gradients"] is (stage > 1)
    assert zero["reduce_bucket_size"] > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("stage", "offload"), [(2, "none"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_what_is_offloaded_is_pinned_and_updated_by_one_kernel_on_gpus(
    device: Literal["cpu", "cuda"], stage: Stage, offload: Offload
) -> None:
    options = ZeroOptions(stage, offload, device=device)
    zero = configuration(options, OptimizerConfig(0.0, 1.0))["zero_optimization"]
    places = [zero[key] for key in ("offload_optimizer", "offload_param") if key in zero]
    assert len(places) == {"none": 0, "optimizer": 1, "parameters": 2}[offload]
    assert all(place == {"device": "cpu", "pin_memory": device == "cuda"} for place in places)
    assert options.fused_optimizer is (device == "cuda" and offload != "none")


@pytest.mark.parametrize("size", [1, 17, 100_003])
def test_the_fused_adamw_gives_the_weights_of_the_loop_up_to_rounding(size: int) -> None:
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(size))
        optimizer = optimizers.adamw({"a.lora_B.weight": parameter}, OptimizerConfig(0.1, 1.0), fused=fused)
        for step in range(20):
            parameter.grad = torch.randn(size, generator=torch.Generator().manual_seed(step))
            optimizers.set_rate(optimizer, 1e-2)
            optimizer.step()
        weights.append(parameter.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def _job(folder: Path, models: dict[str, Path], name: str, resume: Path | None = None) -> Job:
    strategy, offload = _OFFLOADED[name]
    options: dict[str, Any] = {"strategy": strategy, "offload": offload}
    return prepare(
        folder, models["llama"], pairs(12), world=2, training={"max_steps": 4}, every=2, resume=resume, **options
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> CheckedRuns[tuple[str, str]]:
    root = tmp_path_factory.mktemp("offloaded")
    fused = finish_each({(name, "fused"): _job(root / name, models, name) for name in _OFFLOADED}, FusedAdamW())
    resumed = {
        (name, "resumed"): _job(root / f"{name}-again", models, name, fused[name, "fused"].paths.checkpoints / "step-2")
        for name in _OFFLOADED
    }
    loops = {(name, "loop"): _job(root / f"{name}-loop", models, name) for name in _OFFLOADED}
    return CheckedRuns({**fused, **finish_each(resumed, FusedAdamW()), **finish_each(loops)})


@pytest.mark.parametrize("name", _OFFLOADED)
def test_an_offloaded_run_with_the_fused_adamw_learns_and_resumes_bit_identically(
    name: str, runs: CheckedRuns[tuple[str, str]]
) -> None:
    fused, resumed, loop = (runs[name, kind] for kind in ("fused", "resumed", "loop"))
    assert fused.losses == pytest.approx(loop.losses, rel=1e-5)
    assert fused.losses[-1] < fused.losses[0]
    assert resumed.losses == fused.losses[2:]
    adapters = [(run.paths.export / "adapter_model.safetensors").read_bytes() for run in (resumed, fused)]
    assert adapters[0] == adapters[1]
