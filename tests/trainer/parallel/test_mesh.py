"""How many copies of the model the nodes of an fsdp run hold, and what a rank then needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_trainer.parallel import strategy_choice
from finetune_trainer.parallel.estimate import mesh
from finetune_trainer.parallel.estimate.speed_estimate import seconds_per_token
from finetune_trainer.parallel.free_memory import FreeMemory, TooLittleMemory
from finetune_trainer.parallel.memory_estimate import ParallelConfig, TrainingSetup, memory_estimate
from finetune_trainer.parallel.model_size import ModelSize
from finetune_trainer.parallel.strategy_choice import UserChoice

_GIB = 2**30
_LORA = ModelSize(8_037_000_000, 6_815_744, 1_050_939_392, 32, 4096, 14336, 128256)
_FULL = replace(_LORA, trained=_LORA.parameters)


def _setup(ranks: int, nodes: int, *, full: bool = True) -> TrainingSetup:
    return TrainingSetup(ranks, "adamw", 4 if full else 2, True, full, nodes=nodes)


def _gpu(gib: int) -> FreeMemory:
    return FreeMemory("cuda", gib * _GIB, 2000 * _GIB)


@pytest.mark.parametrize(
    ("ranks", "nodes", "gib", "changes", "replicas", "reason"),
    [
        pytest.param(16, 2, 80, {}, 2, "it fits within a node: ", id="a node holds the model"),
        pytest.param(32, 4, 80, {}, 4, "it fits within a node: ", id="each of four nodes holds it"),
        pytest.param(
            16, 4, 40, {}, 1, "fsdp within each of 4 nodes, activations recomputed needs ", id="a node is too small"
        ),
        pytest.param(8, 8, 80, {}, 1, "each node has one process", id="one process per node"),
        pytest.param(
            16, 2, 80, {"offload": "parameters"}, 1, "what is offloaded is sharded over the hosts", id="offloaded"
        ),
        pytest.param(16, 2, 80, {"mesh": (1, 16)}, 1, "the checkpoint was trained", id="a checkpoint of one copy"),
        pytest.param(16, 2, 80, {"mesh": (2, 8)}, 2, "the checkpoint was trained", id="a checkpoint of two copies"),
        pytest.param(16, 2, 80, {"mesh": (4, 4)}, 2, "it fits within a node", id="a checkpoint of four nodes"),
        pytest.param(16, 2, 80, {"mesh": (1, 8)}, 2, "it fits within a node", id="a checkpoint of eight ranks"),
        pytest.param(16, 4, 40, {"mesh": (4, 2)}, 1, "fsdp within each", id="a checkpoint of other copies"),
        pytest.param(8, 1, 80, {}, 1, "", id="one node needs no decision"),
    ],
)
def test_every_node_has_a_copy_of_the_model_if_it_fits_there(
    ranks: int, nodes: int, gib: int, changes: dict[str, Any], replicas: int, reason: str
) -> None:
    user_choice = replace(UserChoice("fsdp", "none", "auto", 2048), **changes)
    choice = strategy_choice.choose(user_choice, _FULL, _setup(ranks, nodes), _gpu(gib))
    assert choice.parallel.replicas == replicas
    assert choice.mesh_reason.startswith(reason)
    assert bool(choice.mesh_reason) == bool(reason)


def test_only_fsdp_has_a_mesh() -> None:
    assert mesh.replica_counts(_setup(16, 2), "fsdp", "none") == (2, 1)
    for strategy in ("ddp", "zero2", "zero3"):
        assert mesh.replica_counts(_setup(16, 2), strategy, "none", (2, 8)) == (1,)
        choice = strategy_choice.choose(
            UserChoice(strategy, "none", "auto", 8), _LORA, _setup(16, 2, full=False), _gpu(80)
        )
        assert choice.mesh_reason == ""


def test_a_rank_needs_what_it_needs_on_its_node_alone() -> None:
    copies, node = (
        memory_estimate(_FULL, _setup(ranks, nodes), ParallelConfig("fsdp", replicas=nodes))
        for ranks, nodes in ((16, 2), (8, 1))
    )
    assert (copies.weights, copies.gradients, copies.optimizer) == (node.weights, node.gradients, node.optimizer)
    shared = memory_estimate(_FULL, _setup(16, 2), ParallelConfig("fsdp"))
    assert copies.gradients == 2 * shared.gradients
    assert copies.optimizer == 2 * shared.optimizer
    # The copies share the work of a checkpoint, so a node copies half of it either way.
    assert copies.host.training == shared.host.training


def test_the_gradients_of_adapters_are_counted_in_full_if_they_wait_for_the_last_micro_batch() -> None:
    setup = _setup(16, 2, full=False)
    copies = memory_estimate(_LORA, setup, ParallelConfig("fsdp", replicas=2))
    assert copies.gradients == 4 * _LORA.trained + 4 * _LORA.trained // 8


def test_weights_that_stay_within_a_node_make_a_micro_batch_faster() -> None:
    for size, full in ((_FULL, True), (_LORA, False)):
        setup = _setup(16, 2, full=full)
        copies, shared = (
            seconds_per_token(size, setup, ParallelConfig("fsdp", replicas=replicas), 2048) for replicas in (2, 1)
        )
        assert copies < shared / 2


def test_more_memory_never_leads_to_a_slower_mesh() -> None:
    seconds = []
    setup = _setup(32, 4)
    for gib in range(8, 200, 4):
        try:
            choice = strategy_choice.choose(UserChoice("fsdp", "none", "auto", 2048), _FULL, setup, _gpu(gib))
        except TooLittleMemory:
            continue
        if choice.estimate.total(choice.tokens) <= _gpu(gib).usable:
            seconds.append(seconds_per_token(_FULL, setup, choice.parallel, choice.tokens))
    assert len(seconds) > 30
    assert seconds == sorted(seconds, reverse=True)
