"""Gradients of ddp: who sends them in bfloat16, and what that does to them, on real ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from finetune_api.messages import events
from finetune_api.messages.run import RunConfig
from finetune_api.spec.hardware import Strategy
from finetune_trainer.parallel.network import gradients
from finetune_trainer.parallel.world import World
from finetune_trainer.training.resolve import gradient_messages
from sizing.fits import METHODS, run_config
from testkit.rows import pairs
from trainer.support import forked_ranks
from trainer.support.fake_step import LiveBytes
from trainer.support.rank_runs import CheckedRuns, Job, finish_each, free_port, prepare

_RANKS = 3
_SHAPES = ((7, 5), (3,), (11, 13), (2,))
_LORA, _, _FULL = METHODS


def _run(method: Any, device: str = "cuda", messages: str = "auto") -> RunConfig:
    run = run_config(method, 8)
    world, training = run.world, run.training
    return run.model_copy(
        update={
            "world": world.model_copy(update={"device": device}),
            "training": training.model_copy(update={"gradient_messages": messages}),
        }
    )


@pytest.mark.parametrize(
    ("run", "strategy", "half", "expected", "reason"),
    [
        pytest.param(_run(_FULL), "ddp", True, "bfloat16", "all weights are trained", id="full on GPUs"),
        pytest.param(_run(_FULL), "ddp", False, "float32", "computed in float32", id="full in float32"),
        pytest.param(_run(_FULL), "fsdp", True, "float32", "fsdp sends them", id="fsdp"),
        pytest.param(_run(_FULL, messages="bfloat16"), "fsdp", True, "float32", "fsdp sends them", id="auto is fsdp"),
        pytest.param(_run(_LORA), "ddp", True, "float32", "adapters", id="adapters"),
        pytest.param(_run(_FULL, "cpu"), "ddp", True, "float32", "on a CPU", id="on a CPU"),
        pytest.param(_run(_FULL, messages="float32"), "ddp", True, "float32", "set by", id="float32 by the user"),
        pytest.param(_run(_LORA, "cpu", "bfloat16"), "ddp", False, "bfloat16", "set by", id="bfloat16 by the user"),
    ],
)
def test_gradients_are_sent_in_bfloat16_only_if_full_training_is_computed_in_it(
    run: RunConfig, strategy: Strategy, half: bool, expected: str, reason: str
) -> None:
    choice, why = gradient_messages(run, strategy, half=half)
    assert choice == expected
    assert reason in why


def _gradients(rank: int) -> list[Any]:
    """Returns parameters with gradients of very different sizes. Rank 0 lacks the second one, and
    nobody has the last one."""
    generator = torch.Generator().manual_seed(rank)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in _SHAPES]
    for number, parameter in enumerate(parameters[:-1]):
        if (rank, number) != (0, 1):
            values = torch.randn(parameter.shape, generator=generator)
            parameter.grad = values * 10.0 ** torch.randint(-6, 6, parameter.shape, generator=generator)
    return parameters


def _average(rank: int, port: int, folder: Path, message: torch.dtype) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=_RANKS)
    parameters = _gradients(rank)
    gradients.average(parameters, World(rank, rank, _RANKS, _RANKS, torch.device("cpu")), message)
    torch.save([parameter.grad for parameter in parameters], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("message", [torch.float32, torch.bfloat16], ids=str)
def test_all_ranks_have_the_same_mean_which_is_as_exact_as_the_format(message: torch.dtype, tmp_path: Path) -> None:
    port = free_port()
    codes = forked_ranks.exit_codes_in_forks(_average, [(rank, port, tmp_path, message) for rank in range(_RANKS)])
    assert codes == [0] * _RANKS
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(_RANKS)]
    sent = [[parameter.grad for parameter in _gradients(rank)] for rank in range(_RANKS)]
    for number, shape in enumerate(_SHAPES[:-1]):
        parts = [torch.zeros(shape) if own[number] is None else own[number] for own in sent]
        exact = torch.stack([part.double() for part in parts]).mean(0)
        largest = torch.stack([part.double().abs() for part in parts]).mean(0)
        # A value that is rounded to 8 bits is off by at most 2^-9 of itself, and so is the mean.
        bound = 2.0**-22 if message == torch.float32 else 2.0**-8
        for result in results:
            assert torch.equal(result[number], results[0][number])
            assert result[number].dtype == torch.float32
            assert result[number].shape == shape
            assert ((result[number].double() - exact).abs() <= bound * largest).all()
    assert [result[-1] for result in results] == [None] * _RANKS


def _counting(original: Callable[..., Any], sizes: list[int]) -> Callable[..., Any]:
    def counted(received: torch.Tensor, sent: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(sent.numel() * sent.element_size())
        return original(received, sent, *arguments, **options)

    return counted


def test_half_of_the_bytes_are_sent_and_memory_for_two_copies_is_needed() -> None:
    """On one rank, whose messages reach itself, a share is everything: 2 + 2 bytes per value, 4 for
    the sums, and 2 for the means."""
    sizes: list[int] = []
    values = 99_999
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_to_all_single", "all_gather_into_tensor"):
                patch.setattr(dist, name, _counting(getattr(dist, name), sizes))
            parameter = torch.nn.Parameter(torch.zeros(values))
            parameter.grad = torch.full((values,), 1.0 + 2.0**-7)
            live = LiveBytes(iter([parameter, parameter.grad]))
            with live:
                gradients.average([parameter], World(0, 0, 1, 1, torch.device("cpu")), torch.bfloat16)
    finally:
        dist.destroy_process_group()
    assert torch.equal(parameter.grad, torch.full((values,), 1.0 + 2.0**-7))
    assert sizes == [2 * (values + 1)] * 2
    assert live.peak <= 10 * values + 1000


def _job(folder: Path, models: dict[str, Path], messages: str) -> Job:
    training = {"max_steps": 4, "learning_rate": 1e-3, "gradient_messages": messages}
    return prepare(folder, models["llama"], pairs(24), world=2, full=True, training=training)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> CheckedRuns[str]:
    root = tmp_path_factory.mktemp("messages")
    return finish_each({name: _job(root / name, models, name) for name in ("auto", "float32", "bfloat16")})


def test_a_run_on_cpus_keeps_its_bits_and_bfloat16_changes_its_losses_by_rounding(runs: CheckedRuns[str]) -> None:
    auto, exact, rounded = (runs[name] for name in ("auto", "float32", "bfloat16"))
    assert auto.losses == exact.losses
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=1e-3)
    for run, choice in ((auto, "float32"), (rounded, "bfloat16")):
        decisions = {event.topic: event.choice for event in run.events(events.DecisionEvent)}
        assert decisions["gradientMessages"] == choice
