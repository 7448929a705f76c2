"""Checkpoints whose shards are stored on two nodes, against a real S3 server: they are complete
only with the shards of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from finetune_api.messages.manifest import FileEntry, Manifest
from finetune_api.messages.run import JobRef, S3Config, WorldConfig
from finetune_api.resource import CheckpointSpec
from finetune_trainer.destination import shard_markers
from finetune_trainer.destination.shard_markers import ShardMarker
from finetune_trainer.manifest import of_file
from finetune_trainer.storage.local import LocalStorage
from testkit.s3_server import S3, running_s3
from trainer.support import supervisor_process
from trainer.support.network_outage import Relay
from trainer.support.supervisor_process import FinishedSupervisor, JobSetup, RunningSupervisor


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3"), ("outputs",)) as server:
        yield server


@dataclass(frozen=True)
class Pair:
    """A job on two nodes with two ranks each."""

    setup: JobSetup
    s3: S3

    @property
    def output(self) -> Path:
        return self.s3.folder / "outputs" / self.setup.folder.name / "v1"

    def step(self, number: int) -> Path:
        return self.output / "checkpoints" / f"step-{number}"

    def keys(self, node: int) -> Path:
        return self.setup.folder / f"keys-{node}"

    def start(self, attempt: int) -> tuple[RunningSupervisor, RunningSupervisor]:
        holds = {str(step): str(self.setup.folder / f"go-{step}") for step in (2, 3, 4, 5)}
        behavior = {"holds": holds, "steps": 6, "shards": True}
        first, second = (
            supervisor_process.start(
                self.setup.with_changes(
                    output=supervisor_process.location(f"s3://outputs/{self.setup.folder.name}/v1", self.keys(node))
                ).run(attempt=attempt, scratch=f"scratch-{node}"),
                self.setup.folder / f"node-{node}",
                node=node,
                behavior=behavior,
            )
            for node in (0, 1)
        )
        return first, second

    def continue_after(self, step: int) -> None:
        """Let the ranks continue after `step`, once its checkpoint is complete."""
        supervisor_process.wait_until(lambda: (self.step(step) / "manifest.json").exists())
        self._let_go(step, step + 1)

    def finish(self, attempt: int) -> tuple[FinishedSupervisor, FinishedSupervisor]:
        """Run an attempt to its end on both nodes. Neither writes another checkpoint before the
        other one has begun, so that both find the same ones."""
        (self.setup.folder / "go-3").unlink(missing_ok=True)
        began = time.time()
        first, second = self.start(attempt)
        supervisor_process.wait_until(lambda: all(self._has_ranks(node, began) for node in (0, 1)))
        self._let_go(3, 4, 5)
        return first.wait(), second.wait()

    def _let_go(self, *steps: int) -> None:
        for step in steps:
            (self.setup.folder / f"go-{step}").touch()

    def _has_ranks(self, node: int, began: float) -> bool:
        events = self.setup.folder / f"scratch-{node}" / "events"
        return any(path.stat().st_mtime >= began for path in events.glob("*"))


@pytest.fixture
def pair(tmp_path: Path, s3: S3) -> Pair:
    pair = Pair(
        JobSetup(tmp_path)
        .write_inputs()
        .with_changes(
            s3=S3Config(allow_http=True),
            world=WorldConfig(nodes=2, processes_per_node=2),
            checkpoint=CheckpointSpec(keep=1),
            grace_seconds=11,  # 10 of them are reserved for the last messages
        ),
        s3,
    )
    for node in (0, 1):
        supervisor_process.secret(pair.keys(node), s3.environment())
    return pair


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _kill(*nodes: RunningSupervisor) -> None:
    """Kill nodes without a signal to stop before, as if they failed."""
    for node in nodes:
        node.process.kill()
        node.process.communicate()


def _resume_line(ended: FinishedSupervisor) -> str:
    (line,) = [line for line in ended.output.splitlines() if "resuming from a checkpoint" in line]
    return line


def test_a_checkpoint_of_two_nodes_is_complete_once_both_have_sent_theirs(pair: Pair) -> None:
    first, second = pair.start(1)
    pair.continue_after(2)
    supervisor_process.wait_until(lambda: (pair.step(4) / "manifest.json").exists())
    supervisor_process.wait_until(lambda: not _files(pair.step(2)))  # markers and all nodes' shards are pruned
    manifest = Manifest.model_validate_json((pair.step(4) / "manifest.json").read_bytes())
    shards = {f"weights-{rank}.safetensors" for rank in range(4)}
    assert {file.path for file in manifest.files} == {*shards, "state.json", "index.json", "history.jsonl"}
    assert len(manifest.files) == 7
    for file in manifest.files:
        assert of_file(pair.step(4) / file.path) == file.sha256
    assert "node-1-attempt-1.json" in _files(pair.step(4))
    pair.continue_after(4)
    done, other = first.wait(), second.wait()
    assert (done.code, other.code) == (0, 0), f"{done.output}\n{other.output}"
    assert supervisor_process.manifest(pair.output).step == 6
    assert not [path for path in (pair.output / "checkpoints").rglob("*") if path.is_file()]


@pytest.mark.parametrize("dies", ["node 1 before its marker", "node 0 before the manifest"])
def test_a_node_that_dies_between_its_upload_and_the_manifest_leaves_the_checkpoint_before(
    pair: Pair, dies: str
) -> None:
    node = int(dies[5])
    file = {0: "step-4/manifest.json", 1: "step-4/node-1-attempt-1.json"}[node]
    path = f"PUT /outputs/{pair.setup.folder.name}/v1/checkpoints/{file}"
    with Relay(pair.s3.endpoint, cut_before=path.encode()) as relay:
        (pair.keys(node) / "AWS_ENDPOINT_URL").write_text(relay.url)
        running = pair.start(1)
        pair.continue_after(2)
        assert relay.tripped.wait(30)
        supervisor_process.wait_until(
            lambda: {f"weights-{rank}.safetensors" for rank in range(4)} <= _files(pair.step(4))
        )
        if node == 0:
            supervisor_process.wait_until(lambda: "node-1-attempt-1.json" in _files(pair.step(4)))
        _kill(running[node])
        if node == 1:
            running[0].terminate()
            ended = running[0].wait()
            assert "time is up before the checkpoint was uploaded" in ended.output
        else:
            _kill(running[1])
    assert "manifest.json" not in _files(pair.step(4))
    (pair.keys(node) / "AWS_ENDPOINT_URL").write_text(pair.s3.endpoint)
    for ended in pair.finish(2):
        assert ended.code == 0, ended.output
        assert '"step": 2' in _resume_line(ended)
    assert not [path for path in (pair.output / "checkpoints").rglob("*") if path.is_file()]


def test_an_altered_shard_makes_both_nodes_skip_the_checkpoint(pair: Pair) -> None:
    setup = pair.setup.with_changes(checkpoint=CheckpointSpec(keep=2))
    both = Pair(setup, pair.s3)
    running = both.start(1)
    both.continue_after(2)
    supervisor_process.wait_until(lambda: (both.step(4) / "manifest.json").exists())
    _kill(*running)
    shard = both.step(4) / "weights-3.safetensors"
    shard.write_bytes(b"x" * shard.stat().st_size)
    for ended in both.finish(2):
        assert ended.code == 0, ended.output
        assert "step-4 is skipped: weights-3.safetensors has another sha256" in ended.output
        assert '"step": 2' in _resume_line(ended)


_JOB = JobRef(namespace="ns", name="job", uid="u-1", attempt=2)
_GROUP = shard_markers.Group(_JOB, b"secret of attempt 2")
_FILES = (FileEntry(path="weights-1.safetensors", size=1, sha256="0" * 64),)
_NO_WAIT = shard_markers.WaitLimit(0.0, lambda: False)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path, role="output", display="out")


def test_markers_of_another_attempt_or_job_are_not_counted(storage: LocalStorage) -> None:
    shard_markers.write_marker(storage, replace(_GROUP, job=_JOB.model_copy(update={"attempt": 1})), 4, 1, _FILES)
    shard_markers.write_marker(storage, replace(_GROUP, job=_JOB.model_copy(update={"uid": "u-2"})), 4, 1, _FILES)
    with pytest.raises(shard_markers.IncompleteCheckpoint, match="node 1 uploaded no shards of it within 0 s"):
        shard_markers.wait_for_markers(storage, _GROUP, 4, range(1, 2), _NO_WAIT)
    shard_markers.write_marker(storage, _GROUP, 4, 1, _FILES)
    assert shard_markers.wait_for_markers(storage, _GROUP, 4, range(1, 2), _NO_WAIT) == _FILES


def _other(change: dict[str, object]) -> Callable[[ShardMarker], ShardMarker]:
    return lambda marker: marker.model_copy(update=change)


@pytest.mark.parametrize(
    "forge",
    [
        _other({"files": (FileEntry(path="weights-1.safetensors", size=1, sha256="f" * 64),)}),
        _other({"proof": ""}),
        lambda marker: marker.model_copy(
            update={"proof": marker.proof_by(b"another secret", shard_markers.path(4, 1, 2))}
        ),
        lambda marker: marker.model_copy(update={"proof": marker.proof_by(_GROUP.secret, shard_markers.path(2, 1, 2))}),
    ],
    ids=["other files", "no proof", "another secret", "the proof of another step"],
)
def test_a_marker_that_no_pod_of_the_attempt_has_written_isnt_counted(
    storage: LocalStorage, forge: Callable[[ShardMarker], ShardMarker]
) -> None:
    shard_markers.write_marker(storage, _GROUP, 4, 1, _FILES)
    at = shard_markers.path(4, 1, 2)
    marker = ShardMarker.model_validate_json(storage.read(at) or b"")
    storage.write(at, forge(marker).model_dump_json(by_alias=True).encode())
    with pytest.raises(shard_markers.IncompleteCheckpoint, match="node 1 uploaded no shards of it"):
        shard_markers.wait_for_markers(storage, _GROUP, 4, range(1, 2), _NO_WAIT)
    storage.write(at, marker.model_dump_json(by_alias=True).encode())
    assert shard_markers.wait_for_markers(storage, _GROUP, 4, range(1, 2), _NO_WAIT) == _FILES


def test_a_step_that_a_node_skipped_is_not_waited_for(storage: LocalStorage) -> None:
    shard_markers.write_marker(storage, _GROUP, 4, 1, _FILES)
    shard_markers.write_marker(storage, _GROUP, 8, 2, _FILES)
    began = time.monotonic()
    with pytest.raises(shard_markers.IncompleteCheckpoint, match="node 2 skipped it for step 8"):
        shard_markers.wait_for_markers(storage, _GROUP, 4, range(1, 3), shard_markers.WaitLimit(60, lambda: False))
    with pytest.raises(shard_markers.IncompleteCheckpoint, match="isn't needed"):
        shard_markers.wait_for_markers(storage, _GROUP, 6, range(1, 2), shard_markers.WaitLimit(60, lambda: True))
    assert time.monotonic() - began < 30
