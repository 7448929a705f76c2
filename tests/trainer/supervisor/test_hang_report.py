"""If ranks hang, every node reports where its ranks are, and which of them the others wait for."""

from __future__ import annotations

import faulthandler
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from finetune_api.messages.run import DataConfig, WorldConfig
from finetune_api.resource import TrainingSpec
from finetune_trainer.supervisor import hang_report
from testkit.tiny_models import tiny_llama
from trainer.support import hanging_rank, supervisor_process
from trainer.support.supervisor_process import JobSetup

_HANGING = f"{sys.executable} {Path(hanging_rank.__file__)}"


def test_two_nodes_that_hang_report_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = setup.with_changes(
        data=DataConfig(train=supervisor_process.location(f"file://{setup.train}"), max_sequence_length=64),
        world=WorldConfig(nodes=2, processes_per_node=1, master_port=port),
        training=TrainingSpec(max_steps=100, global_batch_size=2),
        stall_seconds=4,
    )
    leader, other = (
        supervisor_process.start(
            shared.run(scratch=f"scratch-{node}"), setup.folder / f"node-{node}", node=node, ranks=_HANGING
        )
        for node in (0, 1)
    )
    waits, hangs = leader.wait(120), other.wait(120)
    assert (waits.code, hangs.code) == (73, 73), f"{waits.output}\n{hangs.output}"
    assert "phase training: rank 0 of this node waits for other ranks" in waits.last.message
    assert "rank 1 is at hang_forever (hanging_rank.py:" in hangs.last.message
    assert hangs.last.rank == 1
    assert hangs.last.log_tail.splitlines()[-1].startswith("hang_forever (hanging_rank.py:")
    assert "in agree" in waits.output


def _dump() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode()


def test_a_real_dump_shows_the_innermost_frames() -> None:
    stack = hang_report.stack_trace(f"some log line\n{_dump()}\nanother line")
    assert stack is not None
    assert stack.frames[0].startswith("_dump (test_hang_report.py:")
    assert not stack.waits


_WAITING = """Thread 0x00007f00 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007f01 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/app/finetune_trainer/parallel/world.py", line 48 in total
  File "/app/finetune_trainer/training/steps/step_sync.py", line 60 in agree
  File "/app/finetune_trainer/training/loop.py", line 90 in train
"""
_MOVING = _WAITING.replace("/x/torch/distributed/", "/x/torch/nn/").replace("all_reduce", "linear")


@pytest.mark.parametrize(
    ("dumps", "culprit", "text"),
    [
        pytest.param(
            (_WAITING, _MOVING), 1, "rank 1 is at linear (distributed_c10d.py:2810) < total", id="one computes"
        ),
        pytest.param((_WAITING, ""), 1, "rank 1 printed no stack; rank 0 of this node waits", id="one is silent"),
        pytest.param((_WAITING, _WAITING), 0, "ranks 0, 1 of this node wait for other ranks", id="all wait"),
    ],
)
def test_the_rank_that_waits_for_nobody_is_the_culprit(dumps: tuple[str, ...], culprit: int, text: str) -> None:
    stacks = {rank: hang_report.stack_trace(dump) for rank, dump in enumerate(dumps)}
    assert hang_report.culprit(stacks) == culprit
    assert text in hang_report.summary(stacks)
