"""A base in nf4 that fsdp shards trains like one that every rank holds, and each rank holds less of
it the more ranks there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit

from finetune_trainer.model.quantization import Quantization
from testkit.rows import pairs
from trainer.support import result_loading, stored_bytes
from trainer.support.forked_ranks import KillPoint
from trainer.support.rank_runs import CheckedRuns, FinishedRun, Job, RunningRanks, finish_each, prepare
from trainer.support.stored_bytes import StoredBytes

_HELD_OUT = pairs(16)[12:]
_CELLS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, recomputed": {
        "dtype": "bfloat16",
        "lora": {"target_modules": ("all-linear",), "dropout": 0.1},
        "training": {"activation_checkpointing": "always"},
    },
    "offloaded": {"offload": "parameters"},
    "Conv1D": {"family": "gpt2", "lora": {"target_modules": ("c_attn", "c_proj")}},
    "biases": {"family": "qwen2"},
}


def _job(folder: Path, models: dict[str, Path], cell: dict[str, Any], **options: Any) -> Job:
    options = {**{key: value for key, value in cell.items() if key != "family"}, **options}
    training = {"max_steps": 4, **options.pop("training", {})}
    if options.get("strategy") == "ddp":
        options.pop("offload", None)
    return prepare(
        folder,
        models[cell.get("family", "llama")],
        pairs(12),
        **{"world": 2, "strategy": "fsdp", **options},
        test=_HELD_OUT,
        training=training,
        every=2,
        quantization="nf4",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> CheckedRuns[tuple[str, str]]:
    root = tmp_path_factory.mktemp("nf4")
    jobs = {
        (cell, strategy): _job(root / f"{index}-{strategy}", models, options, strategy=strategy)
        for index, (cell, options) in enumerate(_CELLS.items())
        for strategy in ("fsdp", "ddp")
    }
    runs = finish_each(jobs)
    resumed = {
        (cell, "resumed"): _job(
            root / f"{index}-again", models, options, resume=runs[cell, "fsdp"].paths.checkpoints / "step-2"
        )
        for index, (cell, options) in enumerate(_CELLS.items())
    }
    return CheckedRuns({**runs, **finish_each(resumed)})


@pytest.mark.parametrize("cell", _CELLS)
def test_the_losses_are_those_of_ddp_up_to_rounding(cell: str, runs: CheckedRuns[tuple[str, str]]) -> None:
    sharded, replicated = runs[cell, "fsdp"], runs[cell, "ddp"]
    assert sharded.decision("strategy").choice.startswith("fsdp")
    assert len(sharded.losses) == 4
    tolerance = 5e-3 if "dtype" in _CELLS[cell] else 1e-5
    assert sharded.losses == pytest.approx(replicated.losses, rel=tolerance)
    assert sharded.evals("test")[0] == pytest.approx(replicated.evals("test")[0], rel=tolerance)


@pytest.mark.parametrize("cell", _CELLS)
def test_a_resumed_run_is_bit_identical(cell: str, runs: CheckedRuns[tuple[str, str]]) -> None:
    resumed, whole = runs[cell, "resumed"], runs[cell, "fsdp"]
    assert resumed.losses == whole.losses[2:]
    adapters = [(run.paths.export / "adapter_model.safetensors").read_bytes() for run in (resumed, whole)]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("cell", _CELLS)
def test_the_written_adapter_was_loaded_again_and_gives_the_test_loss(
    cell: str, runs: CheckedRuns[tuple[str, str]], tmp_path: Path
) -> None:
    run = runs[cell, "fsdp"]
    assert run.decision("reload").choice == "equal"
    model = result_loading.result(run, **result_loading.quantized("nf4"))
    tolerance = 2e-2 if "dtype" in _CELLS[cell] else 1e-4
    assert result_loading.loss(model, run, tmp_path) == pytest.approx(run.evals("test")[4], abs=tolerance)


def test_a_killed_run_resumes_with_other_ranks_and_with_ddp(
    runs: CheckedRuns[tuple[str, str]], tmp_path: Path, models: dict[str, Path]
) -> None:
    whole = runs["float32", "fsdp"]
    for index, options in enumerate(({"world": 4}, {"strategy": "ddp"})):
        resume = whole.paths.checkpoints / "step-2"
        ended = _job(tmp_path / str(index), models, {}, resume=resume, **options).finish().check()
        assert ended.losses == pytest.approx(whole.losses[2:], rel=1e-5)


def test_a_run_that_is_killed_while_it_saves_resumes_bit_identically(
    runs: CheckedRuns[tuple[str, str]], tmp_path: Path, models: dict[str, Path]
) -> None:
    killed = _job(tmp_path / "killed", models, {})
    ended = killed.start(kill_point=KillPoint("checkpoints/step-4")).wait_for_crash()
    assert ended.codes[0] != 0
    assert (killed.paths.checkpoints / "step-2").is_dir()
    again = _job(tmp_path / "again", models, {}, resume=killed.paths.checkpoints / "step-2").finish().check()
    assert again.losses == runs["float32", "fsdp"].losses[2:]
    assert _adapter(again) == _adapter(runs["float32", "fsdp"])


def _adapter(run: FinishedRun) -> bytes:
    return (run.paths.export / "adapter_model.safetensors").read_bytes()


def test_a_rank_holds_less_of_the_base_the_more_ranks_there_are(tmp_path: Path, models: dict[str, Path]) -> None:
    by_world: dict[int, list[stored_bytes.Held]] = {}
    for world in (1, 2, 4):
        job = _job(tmp_path / str(world), models, {}, world=world, training={"max_steps": 1})
        RunningRanks(job, faults=dict.fromkeys(range(world), StoredBytes())).wait().check()
        by_world[world] = [stored_bytes.read(job.paths, rank) for rank in range(world)]
    whole, layers = by_world[1][0].sharded, 2
    for world, ranks in by_world.items():
        assert {rank.sharded for rank in ranks} == {whole // world}
        # The first rank reads the base into the host's memory; no other has more than this.
        assert all(rank.peak <= whole // world + whole // layers for rank in ranks[1:])


def test_a_weight_is_quantized_on_the_device_that_computes_wherever_it_is_kept() -> None:
    """PyTorch's meta device stands in for a GPU. It has no values that a weight could get."""
    weight = torch.randn(64, 64)
    on_gpu = Quantization("nf4", torch.device("meta"), torch.device("cpu"))
    with on_gpu.computing(), pytest.raises(RuntimeError, match="incompatible tensor type"):
        Params4bit(weight, quant_type="nf4").to("cpu")
    with Quantization("nf4", torch.device("cpu"), torch.device("cpu")).computing():
        assert Params4bit(weight, quant_type="nf4").to("cpu").shape == (64 * 64 // 2, 1)
