"""Before a stalled rank is killed, its flight recorder says which collectives it has called."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from finetune_api.messages.run import DataConfig, WorldConfig
from finetune_api.resource import TrainingSpec
from finetune_trainer.paths import Paths
from finetune_trainer.reporting import flight_records
from finetune_trainer.supervisor.processes import rank_specs
from testkit.tiny_models import tiny_llama
from trainer.support import hanging_rank, supervisor_process
from trainer.support.supervisor_process import JobSetup

_HANGING = f"{sys.executable} {Path(hanging_rank.__file__)}"


def test_the_rank_that_the_others_wait_for_has_called_fewer_collectives(tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = setup.with_changes(
        data=DataConfig(train=supervisor_process.location(f"file://{setup.train}"), max_sequence_length=64),
        world=WorldConfig(processes_per_node=2, master_port=port),
        training=TrainingSpec(max_steps=100, global_batch_size=2),
        stall_seconds=4,
    ).run()
    ended = supervisor_process.start(run, setup.folder, ranks=_HANGING).wait(120)
    assert (ended.code, ended.last.reason) == (73, "Stalled"), ended.output
    dumps = {rank: flight_records.calls(Paths(tmp_path / "scratch").flight_record(rank).read_text()) for rank in (0, 1)}
    waiting, behind = dumps[0][-1], dumps[1][-1]
    assert waiting.pending
    assert waiting.number == behind.number + 1
    assert waiting.name == "gloo:all_reduce"
    expected = f"rank 1 called {behind.number} collectives and others are in number {waiting.number}, gloo:all_reduce"
    assert expected in ended.last.message
    assert ended.output.count("last collectives") == 2


def _dump(*entries: dict[str, Any], backend: str = "nccl") -> tuple[flight_records.Call, ...]:
    base = {"pg_id": 0, "profiling_name": "nccl:all_gather", "retired": True, "is_p2p": False}
    return flight_records.calls(json.dumps({backend: {"entries": [{**base, **entry} for entry in entries]}}))


def test_groups_and_backends_are_compared_separately() -> None:
    ahead = _dump({"collective_seq_id": 8}, {"collective_seq_id": 9, "retired": False})
    behind = _dump({"collective_seq_id": 8})
    other_group = _dump({"collective_seq_id": 2, "pg_id": 1})
    assert flight_records.summary({0: ahead, 3: behind, 4: ahead}) == (
        "rank 3 called 8 collectives and others are in number 9, nccl:all_gather"
    )
    assert flight_records.summary({0: ahead, 1: other_group}) == ""
    assert flight_records.summary({0: ahead, 1: ahead}) == flight_records.summary({}) == ""
    assert flight_records.last_calls(ahead) == "nccl:all_gather number 8, nccl:all_gather number 9 (pending)"


def test_a_damaged_or_missing_dump_explains_nothing() -> None:
    for text in ("", "{", "[]", '{"nccl": {"entries": [{}]}}', '{"nccl": null}'):
        assert flight_records.calls(text) == ()
    assert flight_records.last_calls(()) == "none"


def _environment(variables: dict[str, str], **world: Any) -> dict[str, str]:
    specs = rank_specs(WorldConfig(**world), 0, Paths(Path("/scratch")), ("rank",), variables)
    return dict(specs[-1].environment)


def test_the_recorder_is_on_and_nccls_own_log_is_read_only_if_the_job_does_not_set_it() -> None:
    many: dict[str, Any] = {"nodes": 2, "processes_per_node": 4, "device": "cuda"}
    default = _environment({}, **many)
    assert default["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert default["NCCL_DEBUG_FILE"] == "/scratch/logs/nccl-3.log"
    chosen = _environment({"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "NCCL_DEBUG": "WARN"}, **many)
    assert "TORCH_FR_BUFFER_SIZE" not in chosen
    assert (chosen["NCCL_DEBUG"], "NCCL_DEBUG_FILE" in chosen) == ("WARN", False)
    assert "NCCL_DEBUG" not in _environment({}, **{**many, "nodes": 1})
