"""Which nodes a new attempt avoids: those whose GPUs failed in the attempts before it."""

from __future__ import annotations

from finetune_api.status import Restarts, Status
from finetune_operator.core.actions import CreateAttempt
from finetune_operator.core.avoided_nodes import MAX_NODES, avoided_nodes, preferences
from finetune_operator.core.decide import decide
from finetune_operator.core.objects import Attempt
from k8s_operator.support.observed_states import NOW, a_dead_pod, a_job, an_attempt, an_observation, failed


def _failed_attempt(number: int, reason: str, node: str, avoided: tuple[str, ...] = ()) -> Attempt:
    pods = (a_dead_pod(0, 75, failed("PeerLost"), node="healthy"), a_dead_pod(1, 80, failed(reason), node=node))
    return an_attempt(number, *pods, failed=True, avoided_nodes=avoided)


def test_the_next_attempt_avoids_the_node_whose_gpu_failed_and_only_that() -> None:
    decision = decide(an_observation(a_job(Status(attempt=1)), _failed_attempt(1, "GpuFault", "node-a")), NOW)
    assert decision.actions == (CreateAttempt(2, Restarts(infrastructure=1), ("node-a",)),)
    assert decision.desired is not None
    assert decision.desired.failure is not None
    assert decision.desired.failure.reason == "GpuFault"


def test_an_ordinary_failure_excludes_no_node() -> None:
    for reason in ("RankKilled", "TrainingError", "StorageUnavailable"):
        assert avoided_nodes((_failed_attempt(1, reason, "node-a"),)) == ()


def test_nodes_of_attempts_that_no_longer_exist_are_inherited() -> None:
    second = _failed_attempt(2, "GpuUnavailable", "node-b", avoided=("node-a",))
    third = _failed_attempt(3, "RankKilled", "node-c", avoided=("node-a", "node-b"))
    assert avoided_nodes((second, third)) == ("node-a", "node-b")


def test_the_list_is_bounded_and_has_the_newest_nodes() -> None:
    many = tuple(f"node-{number}" for number in range(MAX_NODES))
    nodes = avoided_nodes((_failed_attempt(9, "GpuFault", "new", avoided=many),))
    assert nodes == (*many[1:], "new")
    again = avoided_nodes((_failed_attempt(9, "GpuFault", "node-0", avoided=many),))
    assert again == (*many[1:], "node-0")


def test_a_job_that_was_deleted_by_hand_costs_the_list_and_nothing_else() -> None:
    decision = decide(an_observation(a_job(Status(phase="Running", attempt=2))), NOW)
    assert decision.actions == (CreateAttempt(3, Restarts(infrastructure=1)),)


def test_no_nodes_are_no_affinity() -> None:
    assert preferences(()) == []
