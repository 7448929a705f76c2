"""The network between nodes is measured at the start of a run, which changes nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
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


_ROOT = Path(__file__).parents[3]
_MEASURE = """
import os
from datetime import timedelta
from finetune_trainer.parallel import world
from finetune_trainer.parallel.network import bandwidth
group = world.from_environment(os.environ, "cpu")
world.join(group, expected=2, timeout=timedelta(seconds=60))
print(bandwidth.measure(group).bytes_per_second, flush=True)
world.leave(group)
"""


@pytest.fixture
def slow_network() -> Iterator[list[str]]:
    """Returns two network namespaces with the addresses 10.251.7.1 and 10.251.7.2, whose connection
    carries 200 Mbit/s in each direction."""
    spaces = [f"network-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        for space in spaces:
            _ip("netns", "add", space)
        _ip("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
        for number, space in enumerate(spaces, 1):
            _ip("-n", space, "addr", "add", f"10.251.7.{number}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")
            limit = ["tbf", "rate", "200mbit", "burst", "256kb", "latency", "400ms"]
            subprocess.run(["tc", "-n", space, "qdisc", "add", "dev", "eth0", "root", *limit], check=True)
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_the_bandwidth_of_a_real_slow_network_is_measured(slow_network: list[str]) -> None:
    shared = {
        **os.environ, "PYTHONPATH": f"{_ROOT / 'operator'}:{_ROOT / 'trainer_image'}", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.251.7.1", "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", space, sys.executable, "-c", _MEASURE],
            env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank, space in enumerate(slow_network)
    ]  # fmt: skip
    try:
        measured = [float(rank.communicate(timeout=120)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(0.5 * 25e6 < bytes_per_second < 1.3 * 25e6 for bytes_per_second in measured)
