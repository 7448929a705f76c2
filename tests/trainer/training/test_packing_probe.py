"""The comparison of packed rows with rows one by one is as sharp as rounding allows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from finetune_trainer.data import pipeline, splits
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.dataset import Data, read
from finetune_trainer.model import loading
from finetune_trainer.model.check import rotary_positions
from finetune_trainer.model.loss import LossSum
from finetune_trainer.training import packing_setup, rounding_noise
from testkit import tiny_models
from testkit.rows import pairs
from trainer.support.rank_runs import finish_all, prepare


class _NoReporter:
    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


@dataclass
class _Strategy:
    model: torch.nn.Module


def _trial(folder: Path, build: Any, dtype: torch.dtype) -> tuple[packing_setup.Trial, LossSum, loading.LoadedModel]:
    job = prepare(folder / "job", build(folder / "base"), pairs(4))
    data: Data = read(job.run, job.paths, pipeline._OneProcess(), _NoReporter())  # type: ignore[arg-type]
    loaded = loading.load(job.paths.model, dtype=dtype, longest=data.longest)
    collate = Collator(
        packed=False, shared=False, encoder_decoder=False, pad_token=0, decoder_start_token=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    loss_sum = LossSum.of(loaded.base, torch.bfloat16 if dtype == torch.bfloat16 else None, "cpu")
    strategy: Any = _Strategy(loaded.model)
    reporter: Any = _NoReporter()
    layers = tuple(loading.layers(loaded.base))
    return packing_setup.Trial(strategy, data.train, reporter, collate, layers), loss_sum, loaded


_FORMATS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", _FORMATS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("build", [tiny_models.tiny_llama, tiny_models.tiny_gemma3], ids=["llama", "gemma3"])
def test_rows_that_are_packed_right_are_packed(build: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    trial, loss_sum, loaded = _trial(tmp_path, build, dtype)
    micro_batch = packing_setup._shortest(trial.train, loaded.window)
    assert packing_setup._compare(trial, micro_batch, loss_sum, shared=False)[0] is False


@pytest.mark.parametrize("dtype", _FORMATS, ids=["float32", "bfloat16"])
def test_a_window_that_is_overlooked_keeps_rows_apart(dtype: torch.dtype, tmp_path: Path) -> None:
    """The difference is far below 2 % of the loss."""
    trial, loss_sum, loaded = _trial(tmp_path, tiny_models.tiny_gemma3, dtype)
    micro_batch = packing_setup._shortest(trial.train, loaded.window)
    reference = trial.one_by_one_loss(micro_batch, loss_sum)
    for layer in trial.layers:  # what the packed kernel is called with; padded rows have a mask
        layer.self_attn.sliding_window = None
    differs, figures = packing_setup._compare(trial, micro_batch, loss_sum, shared=False)
    loss = trial.loss(micro_batch, replace(trial.padded, packed=True), loss_sum)
    assert 1e-4 < abs(loss - reference) / reference < 2e-2, figures
    assert differs


def test_long_examples_are_compared_by_their_beginnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that several processes have to share don't fit on one of them."""
    trial, loss_sum, _ = _trial(tmp_path, tiny_models.tiny_llama, torch.float32)
    monkeypatch.setattr(packing_setup, "_EXCERPT_TOKENS", 12)
    assert trial.train.lengths.max() > 12
    for number in range(len(trial.train)):
        ids, loss_mask, _ = trial.train.example(number)
        beginning, own_mask, _ = trial.excerpts.example(number)
        assert beginning.tolist() == ids[:12].tolist()
        assert own_mask.tolist() == (loss_mask.tolist() if len(ids) <= 12 else [False] + [True] * 11)
        assert trial.excerpts.lengths[number] == len(beginning)
    for shared in (False, True):
        assert packing_setup._compare(trial, (0, 1, 2), loss_sum, shared=shared)[0] is False
    assert splits.excerpts(replace(trial.train, pairs=True), 12).lengths.max() > 12


def test_the_noise_of_rounding_is_measured_and_repeats(tmp_path: Path) -> None:
    trial, loss_sum, _ = _trial(tmp_path, tiny_models.tiny_llama, torch.bfloat16)

    def measure(layers: Iterable[torch.nn.Module]) -> float:
        return rounding_noise.measure(tuple(layers), lambda: trial._losses((0, 1), loss_sum))

    assert measure(()) == 0
    assert measure(trial.layers[:1]) > 0
    assert measure(trial.layers) == measure(trial.layers)
    assert measure(trial.layers) < 1e-3 * trial.one_by_one_loss((0, 1), loss_sum)
    assert not any(layer._forward_hooks and "move" in str(layer._forward_hooks) for layer in trial.layers)


_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 10000.0}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def _phi3(limit: int, **options: Any) -> Phi3Config:
    return Phi3Config(
        num_attention_heads=8, hidden_size=64, max_position_embeddings=128, original_max_position_embeddings=limit,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "longest", "limit"),
    [
        pytest.param(_phi3(32, rope_parameters=_LONGROPE), 32, None, id="within the limit"),
        pytest.param(_phi3(32, rope_parameters=_LONGROPE), 33, 32, id="beyond the limit"),
        pytest.param(
            LlamaConfig(rope_parameters=_LONGROPE | {"original_max_position_embeddings": 16}),
            17, 16, id="a limit among the parameters",
        ),
        pytest.param(_phi3(32), 128, None, id="usual positions"),
        pytest.param(LlamaConfig(max_position_embeddings=64, rope_parameters=_DYNAMIC), 64, None, id="dynamic, within"),
        pytest.param(LlamaConfig(max_position_embeddings=64, rope_parameters=_DYNAMIC), 65, 64, id="dynamic, beyond"),
    ],
)  # fmt: skip
def test_examples_beyond_a_limit_of_positions_are_computed_one_by_one(
    config: Any, longest: int, limit: int | None
) -> None:
    obstacle = rotary_positions.company_obstacle(config, longest)
    assert obstacle.startswith(f"an example of more than {limit} tokens") is (limit is not None)
    assert bool(obstacle) is (limit is not None)


def test_a_long_example_changes_no_other_example(tmp_path: Path) -> None:
    """The rotary positions of this model change for a whole batch that has a long example."""
    base = tiny_models.tiny_phi3(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 40}
    (base / "config.json").write_text(json.dumps(config))
    rows = pairs(24)
    apart = {"micro_batch_size": 1, "max_steps": 4}
    lora = {"target_modules": ("all-linear",)}
    automatic, reference = finish_all(
        [
            prepare(tmp_path / "automatic", base, rows, lora=lora, validation=rows, training={"max_steps": 4}),
            prepare(
                tmp_path / "apart", base, rows, lora=lora, validation=rows, training=apart, data={"packing": False}
            ),
        ]
    )
    assert automatic.losses == pytest.approx(reference.losses, rel=1e-6)
    assert automatic.evals("validation") == pytest.approx(reference.evals("validation"), rel=1e-6)
    assert automatic.decision("packing").choice == "off"
    assert "40 tokens changes the rotary positions (longrope)" in automatic.decision("microBatchSize").reason


def test_both_answers_of_a_pair_have_the_positions_of_the_reference(tmp_path: Path) -> None:
    """One answer exceeds the limit of this model and the other one doesn't. As the reference has
    the same positions, the first loss is that of equal answers."""
    base = tiny_models.tiny_phi3(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 40}
    (base / "config.json").write_text(json.dumps(config))
    rows = [
        {"prompt": row["prompt"], "chosen": row["completion"] + " and so on" * 6, "rejected": " no"} for row in pairs(8)
    ]
    training = {"objective": "dpo", "max_steps": 2}
    lora = {"target_modules": ("all-linear",)}
    job = prepare(tmp_path / "job", base, rows, lora=lora, data={"format": "preference"}, training=training)
    run = job.finish().check()
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    reason = run.decision("microBatchSize").reason
    assert "(longrope) of all examples that are computed with it; so are both answers of a pair" in reason
