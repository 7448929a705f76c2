"""One job gives the same result however it is divided: ranks, accumulation, packing and ZeRO stages
change only the speed.

All runs of one world size share their processes (run_sequence.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune_api.messages import events
from testkit.rows import pairs
from trainer.support import reference_implementation
from trainer.support.rank_runs import FinishedRun, Job, finish_each, prepare

_ANSWERING = ("1 rank", "2 ranks", "2 ranks, zero2", "2 ranks, zero3", "2 ranks, fsdp")
_ROWS = pairs(21)  # not a multiple of the batch of 8
_PLUS = {"plus_ratio": 4.0}
_WAYS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "1 rank, accumulation": {"training": {"micro_batch_size": 1}},
    "1 rank, padded": {"data": {"packing": False}},
    "1 rank, padded, accumulation": {"data": {"packing": False}, "training": {"micro_batch_size": 2}},
    "2 ranks": {"world": 2},
    "2 ranks, accumulation": {"world": 2, "training": {"micro_batch_size": 1}},
    "2 ranks, padded, accumulation": {"world": 2, "data": {"packing": False}, "training": {"micro_batch_size": 2}},
    "2 ranks, zero1": {"world": 2, "strategy": "zero1"},
    "2 ranks, zero2": {"world": 2, "strategy": "zero2"},
    "2 ranks, zero3": {"world": 2, "strategy": "zero3"},
    "2 ranks, zero2, optimizer offloaded": {"world": 2, "strategy": "zero2", "offload": "optimizer"},
    "2 ranks, fsdp": {"world": 2, "strategy": "fsdp"},
    "2 ranks, recomputed": {"world": 2, "training": {"activation_checkpointing": "always"}},
    "2 ranks, fsdp, recomputed": {"world": 2, "strategy": "fsdp", "training": {"activation_checkpointing": "always"}},
    "2 ranks, recomputed except attention": {"world": 2, "training": {"activation_checkpointing": "selective"}},
    "2 ranks, fsdp, recomputed except attention": {
        "world": 2, "strategy": "fsdp", "training": {"activation_checkpointing": "selective"},
    },
    **{
        f"2 ranks, {strategy}, recomputed except attention": {
            "world": 2, "strategy": strategy, "training": {"activation_checkpointing": "selective"},
        }
        for strategy in ("zero2", "zero3")
    },
    "2 ranks, full, zero3, recomputed": {
        "world": 2, "strategy": "zero3", "full": True, "training": {"activation_checkpointing": "always"},
    },
    "1 rank, LoRA+": {"lora": _PLUS},
    **{
        f"2 ranks, {strategy}, LoRA+, accumulation": {
            "world": 2, "strategy": strategy, "lora": _PLUS, "training": {"micro_batch_size": 1},
        }
        for strategy in ("zero1", "zero2", "zero3", "fsdp")
    },
    "1 rank, full": {"full": True},
    "2 ranks, full": {"world": 2, "full": True},
    "2 ranks, full, zero2": {"world": 2, "full": True, "strategy": "zero2"},
    "2 ranks, full, zero3": {"world": 2, "full": True, "strategy": "zero3", "training": {"micro_batch_size": 1}},
    "2 ranks, full, zero3, parameters offloaded": {
        "world": 2, "full": True, "strategy": "zero3", "offload": "parameters",
    },
    **{
        f"2 ranks, full, {strategy}, recomputed except attention": {
            "world": 2, "full": True, "strategy": strategy,
            "training": {"activation_checkpointing": "selective", "micro_batch_size": 1},
        }
        for strategy in ("zero2", "zero3")
    },
    "2 ranks, full, fsdp": {"world": 2, "full": True, "strategy": "fsdp"},
    "2 ranks, full, fsdp, parameters offloaded": {
        "world": 2, "full": True, "strategy": "fsdp", "offload": "parameters", "training": {"micro_batch_size": 1},
    },
    "2 ranks that share rows": {"world": 2, "sequence": 2},
    "2 ranks that share rows, accumulation, recomputed": {
        "world": 2, "sequence": 2, "training": {"micro_batch_size": 1, "activation_checkpointing": "selective"},
    },
    "2 ranks that share rows, zero2": {"world": 2, "sequence": 2, "strategy": "zero2"},
    "2 ranks that share rows, fsdp": {"world": 2, "sequence": 2, "strategy": "fsdp"},
    "2 ranks that share rows, full, zero3": {"world": 2, "sequence": 2, "full": True, "strategy": "zero3"},
    "2 ranks that share rows, full, fsdp": {"world": 2, "sequence": 2, "full": True, "strategy": "fsdp"},
    "4 ranks, of which 2 share rows, full, fsdp": {"world": 4, "sequence": 2, "full": True, "strategy": "fsdp"},
    "2 ranks, t5, fsdp": {
        "world": 2, "family": "t5", "strategy": "fsdp", "lora": {"target_modules": ("q", "v")},
    },
    "1 rank, qwen2": {"family": "qwen2"},
    "1 rank, gpt2": {"family": "gpt2", "lora": {"target_modules": ("c_attn",)}},
    "1 rank, t5": {"family": "t5", "lora": {"target_modules": ("q", "v")}},
    "2 ranks, t5, accumulation": {
        "world": 2, "family": "t5", "lora": {"target_modules": ("q", "v")}, "training": {"micro_batch_size": 2},
    },
}  # fmt: skip


_HALF: dict[str, dict[str, Any]] = {
    f"2 ranks, {strategy}, bfloat16": {"world": 2, "strategy": strategy, "dtype": "bfloat16"}
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")
}
_HALF["2 ranks, zero3, bfloat16, recomputed"] = {
    "world": 2, "strategy": "zero3", "dtype": "bfloat16", "training": {"activation_checkpointing": "always"},
}  # fmt: skip


for _strategy in ("zero2", "zero3"):
    _HALF[f"2 ranks, {_strategy}, bfloat16, recomputed except attention"] = {
        "world": 2, "strategy": _strategy, "dtype": "bfloat16", "training": {"activation_checkpointing": "selective"},
    }  # fmt: skip

_Key = tuple[str, bool, bool]


def _key(way: dict[str, Any]) -> _Key:
    """Return what distinguishes a way's training from others: family, full training or not, LoRA+
    or not."""
    return way.get("family", "llama"), way.get("full", False), way.get("lora") == _PLUS


def _job(folder: Path, models: dict[str, Path], way: dict[str, Any], samples: int = 0) -> Job:
    options = {key: value for key, value in way.items() if key not in ("family", "training", "data", "full", "lora")}
    full = way.get("full", False)
    training = {
        "learning_rate": 1e-3 if full else 1e-2,
        "weight_decay": 0.01,
        "max_steps": None,
        "epochs": 2.0,
        "scheduler": "cosine",
        "warmup_ratio": 0.2,
        "eval_every_steps": 2,
        "keep_best": False,
        **way.get("training", {}),
    }
    return prepare(
        folder,
        models[way.get("family", "llama")],
        _ROWS,
        full=full,
        lora=way.get("lora"),
        data=way.get("data"),
        training=training,
        validation=pairs(7, 1),
        test=pairs(5, 2),
        samples=samples,
        **options,
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    """The finished runs of all ways, by name."""
    root = tmp_path_factory.mktemp("ways")
    jobs = {
        name: _job(root / str(index), models, way, samples=2 if name in _ANSWERING else 0)
        for index, (name, way) in enumerate({**_WAYS, **_HALF}.items())
    }
    return finish_each(jobs)


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]
) -> dict[_Key, reference_implementation.ReferenceRun]:
    """The results of the reference implementation, a naive loop."""
    root = tmp_path_factory.mktemp("naive")
    answers = {}
    for index, way in enumerate(_WAYS.values()):
        key = _key(way)
        if key not in answers:
            answers[key] = reference_implementation.train(
                _job(root / str(index), models, way), root / f"tokens-{index}"
            )
    return answers


@pytest.mark.parametrize("way", _WAYS)
def test_every_way_gives_the_naive_loops_losses_norms_and_weights(
    way: str, ended: dict[str, FinishedRun], plain: dict[_Key, reference_implementation.ReferenceRun]
) -> None:
    expected = plain[_key(_WAYS[way])]
    steps = ended[way].events(events.StepEvent)
    assert [step.loss for step in steps] == pytest.approx(expected.losses, abs=2e-6)
    assert [step.grad_norm for step in steps] == pytest.approx(expected.norms, rel=1e-4)
    weights = reference_implementation.load_weights(ended[way])
    assert weights.keys() == expected.weights.keys()
    for name, tensor in weights.items():
        assert (tensor - expected.weights[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("way", _WAYS)
def test_the_learning_rate_counts_optimizer_steps(way: str, ended: dict[str, FinishedRun]) -> None:
    """Bug 21: a schedule that advances with each rank or micro-batch, or never reaches its end.

    Warmup over a fifth of 6 steps is 2 steps; a cosine follows that would reach 0 one step after
    the last.
    """
    peak = 1e-3 if "full" in way else 1e-2
    expected = [peak / 3, 2 * peak / 3, *(peak * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(4))]
    assert [step.learning_rate for step in ended[way].events(events.StepEvent)] == pytest.approx(expected)


def test_evaluation_depends_neither_on_ranks_nor_on_batches(ended: dict[str, FinishedRun]) -> None:
    llamas = [ended[name] for name, way in _WAYS.items() if _key(way) == ("llama", False, False)]
    for split in ("validation", "test"):
        expected = llamas[0].evals(split)
        assert len(expected) >= 2
        for other in llamas[1:]:
            assert other.evals(split) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("way", _HALF)
def test_a_frozen_base_in_bfloat16_works_with_every_strategy(way: str, ended: dict[str, FinishedRun]) -> None:
    """Bug 17: ZeRO-3 fails on adapters whose dtype differs from the base's.

    The adapters stay float32; the only difference is how products in bfloat16 are rounded.
    """
    assert ended[way].losses == pytest.approx(ended["2 ranks, ddp, bfloat16"].losses, rel=1e-4)
    assert ended[way].losses == pytest.approx(ended["2 ranks"].losses, rel=1e-2)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_gives_the_same_losses_if_activations_are_recomputed_except_attention(
    strategy: str, half: bool, ended: dict[str, FinishedRun]
) -> None:
    """In float32 they have the same bits. In bfloat16, products may be rounded at other places."""
    name = f"2 ranks, {strategy}{', bfloat16' if half else ''}"
    recomputed = ended[f"{name}, recomputed except attention"]
    assert recomputed.losses == (pytest.approx(ended[name].losses, rel=1e-4) if half else ended[name].losses)
    kinds = {event.topic: event.choice for event in recomputed.events(events.DecisionEvent)}
    assert kinds["activationCheckpointing"].startswith("selective" if strategy == "zero2" else "on")


def test_zero3_gives_the_adapter_of_ddp_to_five_digits(ended: dict[str, FinishedRun]) -> None:
    """Bug 16: weights that are sharded over the ranks are saved empty."""
    ours = load_file(ended["2 ranks"].paths.export / "adapter_model.safetensors")
    theirs = load_file(ended["2 ranks, zero3"].paths.export / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.numel() > 0
        assert (tensor - theirs[name]).abs().max() < 1e-5, name


def test_every_row_is_trained_on_once_per_epoch_and_the_plan_reports_it_beforehand(
    ended: dict[str, FinishedRun],
) -> None:
    for run in ended.values():
        (plan,) = run.events(events.PlanEvent)
        steps = run.events(events.StepEvent)
        assert plan.total_steps == len(steps) == 6  # 42 examples by 8
        assert sum(step.samples for step in steps) == 2 * len(_ROWS)
        assert sum(step.tokens for step in steps) == 2 * plan.tokens_per_epoch
        assert sum(step.label_tokens for step in steps) == 2 * plan.label_tokens_per_epoch
        assert steps[-1].epoch == 2


def test_a_packed_batch_computes_hardly_any_padding_and_a_padded_one_does(ended: dict[str, FinishedRun]) -> None:
    shares = {name: run.events(events.PlanEvent)[0].padding_share for name, run in ended.items()}
    assert shares["1 rank"] < shares["1 rank, padded"]
    assert shares["1 rank, padded"] > 0.05


def test_an_encoder_decoder_is_padded_and_reports_why(ended: dict[str, FinishedRun]) -> None:
    assert ended["1 rank, t5"].decision("packing").choice == "off"
    assert "encoder-decoder" in ended["1 rank, t5"].decision("packing").reason
    assert ended["1 rank, gpt2"].decision("packing").choice == "on"


def test_answers_before_and_after_are_the_same_with_every_strategy(ended: dict[str, FinishedRun]) -> None:
    samples = [(s.prompt, s.before, s.after) for s in ended["1 rank"].events(events.SampleEvent)]
    assert len(samples) == 2
    for way in _ANSWERING:
        assert [(s.prompt, s.before, s.after) for s in ended[way].events(events.SampleEvent)] == samples
