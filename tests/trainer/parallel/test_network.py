"""The network between nodes is measured at the start of a run, which changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.messages import events
from finetune_trainer.parallel.network import bandwidth
from finetune_trainer.parallel.network.bandwidth import Bandwidth
from testkit.rows import pairs
from trainer.support.rank_runs import prepare


def test_bandwidth_is_what_a_ring_moves_through_each_node() -> None:
    measured = Bandwidth(message_bytes=128 << 20, seconds=0.01, ranks=4, backend="NCCL", transport="IB")
    assert measured.bytes_per_second == pytest.approx(1.5 * (128 << 20) / 0.01)
    assert measured.choice == "20.1 GB/s by NCCL over IB"
    assert measured.reason == "an all-reduce of 128 MiB on 4 ranks took 10 ms"


WARNINGS = {
    "split weights on a slow network": ("fsdp", 0.02, True),
    "split weights by DeepSpeed": ("zero3", 0.02, True),
    "split weights on a fast network": ("fsdp", 0.005, False),
    "adapters alone": ("ddp", 1.0, False),
    "gradients of zero2": ("zero2", 1.0, False),
}


@pytest.mark.parametrize(("strategy", "seconds", "warns"), WARNINGS.values(), ids=WARNINGS)
def test_only_split_weights_on_a_slow_network_are_warned_of(strategy: str, seconds: float, warns: bool) -> None:
    warning = Bandwidth(128 << 20, seconds, 4, "NCCL", "Socket").warning(strategy)
    assert bool(warning) == warns
    if warns:
        assert f"distribution.strategy={strategy}" in warning
        assert "less than 20 GB/s" in warning
        assert "resources.extra" in warning


NCCL_LOG = """node-0:71:71 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB eth0:10.0.0.4<0>
node-0:71:96 [0] NCCL INFO Using network IB
node-0:71:96 [0] NCCL INFO ncclCommInitRankConfig comm 0x55 rank 0 nranks 16
"""


def test_the_transport_is_read_from_nccls_log(tmp_path: Path) -> None:
    log = tmp_path / "nccl-0.log"
    assert bandwidth.transport(log) == bandwidth.transport(None) == ""
    log.write_text(NCCL_LOG)
    assert bandwidth.transport(log) == "IB"


def test_two_nodes_measure_once_and_compute_the_same_losses_as_one(tmp_path: Path, models: dict[str, Path]) -> None:
    rows = pairs(20)
    lora = {"dropout": 0.1}
    jobs = {
        name: prepare(tmp_path / name, models["llama"], rows, world=2, nodes=nodes, lora=lora)
        for name, nodes in (("one", 1), ("two", 2))
    }
    one, two = (job.finish().check() for job in jobs.values())
    assert two.losses == one.losses
    assert not one.events(events.NetworkEvent)
    (measured,) = two.events(events.NetworkEvent)
    assert (measured.backend, measured.warning) == ("gloo", "")
    assert measured.bytes_per_second > 1e6
    decision = two.decision("network")
    assert decision.choice.endswith("GB/s by gloo")
    assert "4 MiB on 2 ranks" in decision.reason
