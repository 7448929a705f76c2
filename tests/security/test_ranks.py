"""Ranks exchange JSON and tensors. Nothing that another process sends is unpickled."""

from __future__ import annotations

import math
import pickle
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.errors import RunError
from finetune_trainer.evaluation.generation import Answer
from finetune_trainer.parallel import messages, world
from finetune_trainer.parallel.strategy import Extent
from testkit.rows import pairs
from testkit.tiny_models import tiny_llama
from trainer.support.no_pickle import NoPickle
from trainer.support.rank_runs import CheckedRuns, Job, finish_each, free_port, prepare

_WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2", "offload": "optimizer"},
    "zero3": {"strategy": "zero3", "offload": "parameters", "full": True},
    "fsdp": {"strategy": "fsdp", "shards": "always"},
    "fsdp, full": {"strategy": "fsdp", "full": True, "offload": "parameters"},
    "ddp, pairs": {"rows": "preferences"},
}


def _job(folder: Path, model: Path, **options: Any) -> Job:
    rows: Any = pairs(8)
    training = {"max_steps": 2, "eval_every_steps": 1}
    if options.pop("rows", "") == "preferences":
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "No."} for r in rows]
        training |= {"objective": "dpo"}
    return prepare(
        folder, model, rows, world=2, validation=0.25, samples=2, every=1, training=training, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> CheckedRuns[str]:
    root = tmp_path_factory.mktemp("no-pickle")
    model = tiny_llama(root / "model")
    return finish_each({name: _job(root / name, model, **way) for name, way in _WAYS.items()}, NoPickle())


@pytest.mark.parametrize("way", _WAYS)
def test_no_strategy_unpickles_anything(ended: CheckedRuns[str], way: str) -> None:
    assert len(ended[way].losses) == 2


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        pytest.param({0: math.inf, 7: 0.1, 9: -1e-300}, dict[int, float], id="losses by row"),
        pytest.param(({"a": Answer("é😀\n", True)}, False), tuple[dict[str, Answer], bool], id="answers"),
        pytest.param({"w": Extent((2, 3), 0, 6)}, dict[str, Extent], id="parts of weights"),
        pytest.param(CheckpointState(step=3, losses=(0.25,)), CheckpointState | None, id="a state"),
        pytest.param(None, CheckpointState | None, id="no state"),
        pytest.param({"w": ((2,), "bfloat16")}, dict[str, messages.TensorFormat], id="formats"),
    ],
)
def test_a_message_has_what_was_sent(value: Any, kind: Any) -> None:
    assert messages.decode(messages.encode(value, kind), kind) == value


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        pytest.param(pickle.dumps("text"), str, id="a pickle"),
        pytest.param(b"", int, id="nothing"),
        pytest.param(b'"3"', int, id="another type"),
        pytest.param(b"[" * 100_000, dict[str, Answer], id="nested deeply"),
        pytest.param(b'{"w": [[2], 3]}', dict[str, messages.TensorFormat], id="half right"),
        pytest.param(b"\xff\xfe", str, id="no UTF-8"),
    ],
)
def test_a_message_of_the_wrong_form_ends_the_attempt(message: bytes, kind: Any) -> None:
    with pytest.raises(RunError, match="another rank sent"):
        messages.decode(message, kind)


@pytest.mark.parametrize("size", [-1, messages.MAX_BYTES + 1, 2**62])
def test_a_message_without_end_is_refused(size: int) -> None:
    with pytest.raises(RunError, match="announced"):
        messages.check_size(size)


@pytest.mark.parametrize("name", ["load", "Tensor", "__name__", "float33"])
def test_a_dtype_is_never_another_name_of_torch(name: str) -> None:
    with pytest.raises(RunError, match="unknown dtype"):
        messages.empty(((2,), name), "cpu")


def test_the_store_listens_on_the_loopback_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", world.LOOPBACK)
    monkeypatch.setenv("MASTER_PORT", str(port))
    only_rank = world.World(0, 0, 1, 1, torch.device("cpu"))
    store = world.store(only_rank, timedelta(seconds=20))
    assert store is not None
    store.set("key", "value")
    socket.create_connection((world.LOOPBACK, port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):  # a listener on all addresses would accept it
        socket.create_connection(("127.0.0.2", port), timeout=10)
