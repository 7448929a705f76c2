"""A store that refuses writes while a job runs, with a real S3 server: keys that are rotated,
permissions that are taken away, and a quota."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages.run import S3Config
from testkit.s3_server import S3, running_s3
from trainer.support import supervisor_process
from trainer.support.operator_replica import replica
from trainer.support.store_proxy import DENIED, FULL, Refusal, StoreProxy
from trainer.support.supervisor_process import JobSetup, RunningSupervisor


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3"), ("outputs",), users=True) as server:
        yield server


@dataclass(frozen=True)
class Bench:
    """A job whose output is a bucket. It stops after step 2 until the file `go` exists."""

    setup: JobSetup
    s3: S3
    keys: Path

    @property
    def output(self) -> Path:
        return self.s3.folder / "outputs" / self.setup.folder.name

    @property
    def events(self) -> str:
        file = self.setup.folder / "scratch/events/rank-0.jsonl"
        return file.read_text() if file.exists() else ""

    def use(self, endpoint: str) -> None:
        (self.keys / "AWS_ENDPOINT_URL").write_text(endpoint)

    def go_on(self) -> None:
        (self.setup.folder / "go").touch()

    def start(self, url: str = "", **changes: Any) -> RunningSupervisor:
        (self.setup.folder / "token").write_text("t0ken")
        progress = supervisor_process.progress_config(url, self.setup.folder / "token") if url else None
        setup = self.setup.with_changes(progress=progress, **changes)
        behavior = {"steps": 6, "checkpoint_every": 2, "hold": str(self.setup.folder / "go"), "hold_at": 2}
        return supervisor_process.start(setup.run(), setup.folder, behavior=behavior)

    def wait_for_first_checkpoint(self) -> None:
        supervisor_process.wait_until(lambda: (self.output / "checkpoints/step-2/manifest.json").exists(), 60)


@pytest.fixture
def bench(tmp_path: Path, s3: S3) -> Bench:
    keys = supervisor_process.secret(tmp_path / "keys", s3.environment())
    setup = JobSetup(tmp_path).write_inputs()
    output = supervisor_process.location(f"s3://outputs/{tmp_path.name}", keys)
    return Bench(setup.with_changes(output=output, s3=S3Config(allow_http=True)), s3, keys)


@pytest.mark.parametrize("rotated", ["while it trains", "after its end"])
def test_rotated_keys_are_read_again_and_nothing_is_trained_twice(bench: Bench, rotated: str) -> None:
    name = f"user-{bench.setup.folder.name}".replace("_", "-")[:60]
    bench.s3.add_user(f"{name}-old", "first-secret")
    (bench.keys / "AWS_ACCESS_KEY_ID").write_text(f"{name}-old")
    (bench.keys / "AWS_SECRET_ACCESS_KEY").write_text("first-secret")
    running = bench.start()
    bench.wait_for_first_checkpoint()
    bench.s3.add_user(f"{name}-new", "second-secret")
    bench.s3.remove_user(f"{name}-old")
    if rotated == "after its end":
        bench.go_on()
        supervisor_process.wait_until(lambda: '"saved"' in bench.events, 60)
    (bench.keys / "AWS_ACCESS_KEY_ID").write_text(f"{name}-new")
    (bench.keys / "AWS_SECRET_ACCESS_KEY").write_text("second-secret")
    bench.go_on()
    ended = running.wait(120)
    assert ended.code == 0, ended.output
    assert ended.output.count("ranks started") == 1
    assert supervisor_process.manifest(bench.output).step == 6
    assert "secret" not in ended.output


REFUSALS = {"permissions": (DENIED, "AccessDenied"), "quota": (FULL, "DiskFull")}


@pytest.mark.parametrize(("refusal", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_refused_checkpoint_is_reported_and_a_refused_result_is_held_until_it_is_accepted(
    bench: Bench, refusal: Refusal, reason: str
) -> None:
    with StoreProxy(bench.s3.endpoint) as store, replica() as operator:
        bench.use(store.url)
        running = bench.start(operator.url)
        bench.wait_for_first_checkpoint()
        supervisor_process.wait_until(lambda: operator.taken and operator.last.storing, 60)
        assert operator.last.storing is not None
        assert operator.last.storing.reason == ""
        store.refusal = refusal
        bench.go_on()
        supervisor_process.wait_until(lambda: '"saved"' in bench.events, 60)
        supervisor_process.wait_until(lambda: "holds the result of step 6" in operator.last.message, 60)
        storing = operator.last.storing
        assert storing is not None
        assert (storing.reason, storing.steps_at_risk) == (reason, 4)
        assert f"{refusal.code}: {refusal.message}" in storing.message
        assert storing.since is not None
        assert not _children(running)
        store.refusal = None
        ended = running.wait(120)
    assert ended.code == 0, ended.output
    assert ended.output.count("ranks started") == 1
    assert operator.last.storing is not None
    assert operator.last.storing.reason == ""
    assert operator.last.artifact == ended.last.artifact


def test_a_result_is_held_for_a_bounded_time_and_the_next_attempt_resumes(bench: Bench) -> None:
    with StoreProxy(bench.s3.endpoint) as store:
        bench.use(store.url)
        running = bench.start(hold_seconds=2.0)
        bench.wait_for_first_checkpoint()
        store.refusal = DENIED
        bench.go_on()
        ended = running.wait(120)
        assert (ended.code, ended.last.reason) == (82, "ResultNotStored"), ended.output
        assert "output.holdSeconds=2: AccessDenied" in ended.last.message
        assert DENIED.message in ended.last.message
        assert ended.last.checkpoint is not None
        assert ended.last.checkpoint.step == 2
        store.refusal = None
        again = replace(bench, setup=bench.setup.with_changes(hold_seconds=2.0))
        run = again.setup.run(attempt=2)
        ended = supervisor_process.supervise(run, again.setup.folder, behavior={"steps": 6, "checkpoint_every": 2})
    assert ended.code == 0, ended.output
    assert any('"step": 2' in line for line in ended.output.splitlines() if "resuming from" in line)


def test_of_two_jobs_that_start_together_on_a_slow_store_one_is_refused_before_it_trains(bench: Bench) -> None:
    with StoreProxy(bench.s3.endpoint, delay=0.2) as store:
        bench.use(store.url)
        bench.go_on()
        folders = [bench.setup.folder / name for name in ("first", "second")]
        runs = [
            bench.setup.run(uid=f"uid-{folder.name}", scratch=f"scratch-{folder.name}").model_copy(
                update={"job": bench.setup.run(uid=f"uid-{folder.name}").job.model_copy(update={"name": folder.name})}
            )
            for folder in folders
        ]
        started = [supervisor_process.start(run, folder) for run, folder in zip(runs, folders, strict=True)]
        ended = {run.job.name: process.wait(120) for run, process in zip(runs, started, strict=True)}
    (loser,) = [name for name, end in ended.items() if end.code]
    (winner,) = ended.keys() - {loser}
    assert ended[loser].last.reason == "OutputOccupied", ended[loser].output
    assert f"is claimed by ns/{winner}" in ended[loser].last.message
    assert "ranks started" not in ended[loser].output
    assert "uid-" not in ended[loser].last.message
    manifest = supervisor_process.manifest(bench.output)
    assert manifest.job.name == winner
    assert not (bench.output / "finetune/owner.json").exists()
    assert json.loads((bench.output / "finetune/manifest.json").read_bytes())["job"]["name"] == winner


def _children(running: RunningSupervisor) -> str:
    return Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text()
