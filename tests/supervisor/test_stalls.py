"""A group that hangs: every node tells where its ranks are, and which of them the others wait for."""

from __future__ import annotations

import faulthandler
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from finetune_api.resource import TrainingSpec
from finetune_api.run import DataConfig, WorldConfig
from finetune_trainer import stacks
from supervisor import world
from supervisor.world import Setup
from testkit.tiny_models import tiny_llama

_HANGING = f"{sys.executable} {Path(__file__).with_name('hanging.py')}"


def test_two_nodes_that_hang_tell_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    setup = Setup(tmp_path).write_inputs()
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = setup.but(
        data=DataConfig(train=world.place(f"file://{setup.train}"), max_sequence_length=64),
        world=WorldConfig(nodes=2, processes_per_node=1, master_port=port),
        training=TrainingSpec(max_steps=100, global_batch_size=2),
        stall_seconds=4,
    )
    leader, other = (
        world.start(shared.run(scratch=f"scratch-{node}"), setup.folder / f"node-{node}", node=node, ranks=_HANGING)
        for node in (0, 1)
    )
    waits, hangs = leader.wait(120), other.wait(120)
    assert (waits.code, hangs.code) == (73, 73), f"{waits.output}\n{hangs.output}"
    assert "phase training: rank 0 of this node wait for others" in waits.last.message
    assert "rank 1 is at hang_for_ever (hanging.py:" in hangs.last.message
    assert hangs.last.rank == 1
    assert hangs.last.log_tail.splitlines()[-1].startswith("hang_for_ever (hanging.py:")
    assert "in agree" in waits.output


def _dump() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode()


def test_a_real_dump_tells_the_innermost_frames() -> None:
    place = stacks.place(f"some log line\n{_dump()}\nanother line")
    assert place is not None
    assert place.frames[0].startswith("_dump (test_stalls.py:")
    assert not place.waits


_WAITING = """Thread 0x00007f00 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007f01 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/app/finetune_trainer/world.py", line 48 in total
  File "/app/finetune_trainer/agreement.py", line 60 in agree
  File "/app/finetune_trainer/train.py", line 90 in train
"""
_MOVING = _WAITING.replace("/x/torch/distributed/", "/x/torch/nn/").replace("all_reduce", "linear")


@pytest.mark.parametrize(
    ("dumps", "culprit", "words"),
    [
        pytest.param(
            (_WAITING, _MOVING), 1, "rank 1 is at linear (distributed_c10d.py:2810) < total", id="one computes"
        ),
        pytest.param((_WAITING, ""), 1, "rank 1 tells no stack; rank 0 of this node wait", id="one is silent"),
        pytest.param((_WAITING, _WAITING), 0, "ranks 0, 1 of this node wait for others", id="all wait"),
    ],
)
def test_the_rank_that_waits_for_nobody_is_the_one_to_look_at(dumps: tuple[str, ...], culprit: int, words: str) -> None:
    places = {rank: stacks.place(dump) for rank, dump in enumerate(dumps)}
    assert stacks.culprit(places) == culprit
    assert words in stacks.told(places)
