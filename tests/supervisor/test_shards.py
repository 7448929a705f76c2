"""Checkpoints whose shards lie on two nodes, against a real S3 server: complete only with all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune_api.manifest import FileEntry, Manifest
from finetune_api.resource import CheckpointSpec
from finetune_api.run import JobRef, WorldConfig
from finetune_trainer import digests, marks
from finetune_trainer.folder import FolderPlace
from supervisor import world
from supervisor.outage import Wire
from supervisor.world import Ended, Running, Setup
from testkit.s3_server import S3, running_s3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3"), ("outputs",)) as server:
        yield server


@dataclass(frozen=True)
class Pair:
    """A job on two nodes with two ranks each."""

    setup: Setup
    s3: S3

    @property
    def output(self) -> Path:
        return self.s3.folder / "outputs" / self.setup.folder.name / "v1"

    def step(self, number: int) -> Path:
        return self.output / "checkpoints" / f"step-{number}"

    def keys(self, node: int) -> Path:
        return self.setup.folder / f"keys-{node}"

    def start(self, attempt: int) -> tuple[Running, Running]:
        holds = {str(step): str(self.setup.folder / f"go-{step}") for step in (2, 4)}
        behaviour = {"holds": holds, "steps": 6, "shards": True}
        first, second = (
            world.start(
                self.setup.but(output=world.place(f"s3://outputs/{self.setup.folder.name}/v1", self.keys(node))).run(
                    attempt=attempt, scratch=f"scratch-{node}"
                ),
                self.setup.folder / f"node-{node}",
                node=node,
                behaviour=behaviour,
            )
            for node in (0, 1)
        )
        return first, second

    def go_on(self, step: int) -> None:
        """Past a step, once its checkpoint is complete."""
        world.until(lambda: (self.step(step) / "manifest.json").exists())
        (self.setup.folder / f"go-{step}").touch()

    def finish(self, attempt: int) -> tuple[Ended, Ended]:
        """To the end."""
        (self.setup.folder / "go-4").touch()
        first, second = self.start(attempt)
        return first.wait(), second.wait()


@pytest.fixture
def pair(tmp_path: Path, s3: S3) -> Pair:
    pair = Pair(
        Setup(tmp_path)
        .write_inputs()
        .but(
            world=WorldConfig(nodes=2, processes_per_node=2), checkpoint=CheckpointSpec(keep=1), grace_seconds=11
        ),  # 10 of them are kept for last words
        s3,
    )
    for node in (0, 1):
        world.secret(pair.keys(node), s3.environment())
    return pair


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _stopped(*nodes: Running) -> None:
    """As when a node fails: nobody is asked."""
    for node in nodes:
        node.process.kill()
        node.process.communicate()


def _went_on_from(ended: Ended) -> str:
    (line,) = [line for line in ended.output.splitlines() if "going on from a checkpoint" in line]
    return line


def test_a_checkpoint_of_two_nodes_is_complete_once_both_have_sent_theirs(pair: Pair) -> None:
    first, second = pair.start(1)
    pair.go_on(2)
    world.until(lambda: (pair.step(4) / "manifest.json").exists())
    world.until(lambda: not _files(pair.step(2)))  # marks and all nodes' shards are pruned
    manifest = Manifest.model_validate_json((pair.step(4) / "manifest.json").read_bytes())
    shards = {f"weights-{rank}.safetensors" for rank in range(4)}
    assert {file.path for file in manifest.files} == {*shards, "state.json", "index.json", "history.jsonl"}
    assert len(manifest.files) == 7
    for file in manifest.files:
        assert digests.of_file(pair.step(4) / file.path) == file.sha256
    assert "node-1-attempt-1.json" in _files(pair.step(4))
    pair.go_on(4)
    done, other = first.wait(), second.wait()
    assert (done.code, other.code) == (0, 0), f"{done.output}\n{other.output}"
    assert world.manifest(pair.output).step == 6
    assert not [path for path in (pair.output / "checkpoints").rglob("*") if path.is_file()]


@pytest.mark.parametrize("dies", ["node 1 before its mark", "node 0 before the manifest"])
def test_a_node_that_dies_between_its_upload_and_the_manifest_leaves_the_checkpoint_before(
    pair: Pair, dies: str
) -> None:
    node = int(dies[5])
    words = {0: "step-4/manifest.json", 1: "step-4/node-1-attempt-1.json"}[node]
    path = f"PUT /outputs/{pair.setup.folder.name}/v1/checkpoints/{words}"
    with Wire(pair.s3.endpoint, cut_before=path.encode()) as wire:
        (pair.keys(node) / "AWS_ENDPOINT_URL").write_text(wire.url)
        running = pair.start(1)
        pair.go_on(2)
        assert wire.tripped.wait(30)
        world.until(lambda: {f"weights-{rank}.safetensors" for rank in range(4)} <= _files(pair.step(4)))
        if node == 0:
            world.until(lambda: "node-1-attempt-1.json" in _files(pair.step(4)))
        _stopped(running[node])
        if node == 1:
            running[0].terminate()
            ended = running[0].wait()
            assert "time is up before the checkpoint was uploaded" in ended.output
        else:
            _stopped(running[1])
    assert "manifest.json" not in _files(pair.step(4))
    (pair.keys(node) / "AWS_ENDPOINT_URL").write_text(pair.s3.endpoint)
    for ended in pair.finish(2):
        assert ended.code == 0, ended.output
        assert '"step": 2' in _went_on_from(ended)
    assert not [path for path in (pair.output / "checkpoints").rglob("*") if path.is_file()]


def test_a_shard_that_was_altered_costs_both_nodes_the_checkpoint(pair: Pair) -> None:
    kept = pair.setup.but(checkpoint=CheckpointSpec(keep=2))
    both = Pair(kept, pair.s3)
    running = both.start(1)
    both.go_on(2)
    world.until(lambda: (both.step(4) / "manifest.json").exists())
    _stopped(*running)
    shard = both.step(4) / "weights-3.safetensors"
    shard.write_bytes(b"x" * shard.stat().st_size)
    for ended in both.finish(2):
        assert ended.code == 0, ended.output
        assert "step-4 is left aside: weights-3.safetensors has another sha256" in ended.output
        assert '"step": 2' in _went_on_from(ended)


_JOB = JobRef(namespace="ns", name="job", uid="u-1", attempt=2)
_FILES = (FileEntry(path="weights-1.safetensors", size=1, sha256="0" * 64),)
_HASTY = marks.Wait(0.0, lambda: False)


@pytest.fixture
def place(tmp_path: Path) -> FolderPlace:
    return FolderPlace(tmp_path, role="output", display="out")


def test_marks_of_another_attempt_or_job_are_not_counted(place: FolderPlace) -> None:
    marks.leave(place, _JOB.model_copy(update={"attempt": 1}), 4, 1, _FILES)
    marks.leave(place, _JOB.model_copy(update={"uid": "u-2"}), 4, 1, _FILES)
    with pytest.raises(marks.Missing, match="node 1 left no shards of it within 0 s"):
        marks.gather(place, _JOB, 4, range(1, 2), _HASTY)
    marks.leave(place, _JOB, 4, 1, _FILES)
    assert marks.gather(place, _JOB, 4, range(1, 2), _HASTY) == _FILES


def test_a_step_that_a_node_passed_over_is_not_waited_for(place: FolderPlace) -> None:
    marks.leave(place, _JOB, 4, 1, _FILES)
    marks.leave(place, _JOB, 8, 2, _FILES)
    began = time.monotonic()
    with pytest.raises(marks.Missing, match="node 2 passed it over for step 8"):
        marks.gather(place, _JOB, 4, range(1, 3), marks.Wait(60, lambda: False))
    with pytest.raises(marks.Missing, match="nobody waits"):
        marks.gather(place, _JOB, 6, range(1, 2), marks.Wait(60, lambda: True))
    assert time.monotonic() - began < 30
