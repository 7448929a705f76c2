"""The supervisor against a real S3 server: inputs and the result are in buckets, keys come from a
mounted Secret, and a store refuses access in every way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune_api.messages.run import CacheConfig, DataConfig, ModelConfig, S3Config
from finetune_trainer.manifest import of_file
from testkit.s3_server import S3, running_s3
from trainer.support import supervisor_process
from trainer.support.network_outage import Relay
from trainer.support.supervisor_process import JobSetup


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3"), ("models", "data", "outputs")) as server:
        supervisor_process.small_model(server.folder / "models" / "tiny")
        (server.folder / "data" / "train.jsonl").write_text(supervisor_process.ROWS)
        yield server


@dataclass(frozen=True)
class Remote:
    setup: JobSetup
    s3: S3
    keys: Path
    output: Path

    def with_changes(self, **changes: object) -> Remote:
        return Remote(self.setup.with_changes(**changes), self.s3, self.keys, self.output)


@pytest.fixture
def remote(tmp_path: Path, s3: S3) -> Remote:
    keys = supervisor_process.secret(tmp_path / "keys", s3.environment())
    name = tmp_path.name
    setup = JobSetup(tmp_path).with_changes(
        model=ModelConfig(location=supervisor_process.location("s3://models/tiny", keys)),
        data=DataConfig(train=supervisor_process.location("s3://data/train.jsonl", keys)),
        output=supervisor_process.location(f"s3://outputs/{name}/v1", keys),
        s3=S3Config(allow_http=True),
    )
    return Remote(setup, s3, keys, s3.folder / "outputs" / name / "v1")


def failed(remote: Remote, command: str = "supervise") -> tuple[int, str, str]:
    ended = supervisor_process.supervise(remote.setup.run(), remote.setup.folder, command=command)
    return ended.code, ended.last.reason, ended.last.message


def test_model_and_data_come_from_buckets_and_the_result_goes_to_one(remote: Remote) -> None:
    ended = supervisor_process.supervise(remote.setup.run(), remote.setup.folder)
    assert ended.code == 0, ended.output
    assert (remote.output / "adapter_model.safetensors").read_bytes() == b"weights after 4"
    assert supervisor_process.manifest(remote.output).step == 4
    assert "secret" not in ended.output


@pytest.mark.parametrize("command", ["preflight", "supervise"])
def test_a_model_that_the_scratch_disk_cant_hold_is_refused_before_it_is_downloaded(
    command: str, remote: Remote
) -> None:
    run = remote.setup.run().model_copy(update={"scratch_bytes": 500})
    ended = supervisor_process.supervise(run, remote.setup.folder, command=command)
    assert ended.last.reason == "InvalidConfig"
    assert "resources.scratch is 0.0 GiB, but the files of the model s3://models/tiny" in ended.last.message
    assert not list((Path(run.scratch) / "model").glob("*.safetensors"))


def test_a_model_is_downloaded_once_for_two_jobs_that_share_a_cache(remote: Remote, tmp_path: Path) -> None:
    cache = CacheConfig(root=str(tmp_path / "cache"), max_bytes=10**9)
    outputs = []
    for number in (1, 2):
        output = supervisor_process.location(f"s3://outputs/{tmp_path.name}/cached-{number}", remote.keys)
        run = remote.setup.with_changes(output=output).run()
        run = run.model_copy(update={"model_cache": cache, "scratch": f"{run.scratch}-{number}"})
        ended = supervisor_process.supervise(run, remote.setup.folder)
        assert ended.code == 0, ended.output
        outputs.append(ended.output)
        (weights,) = (Path(run.scratch) / "model").glob("*.safetensors")
        assert weights.resolve().is_relative_to(tmp_path / "cache" / "models")
    assert ["the model is in the cache" in output for output in outputs] == [False, True]


def test_keys_and_endpoint_may_come_from_the_environment(remote: Remote) -> None:
    anonymous = {
        "model": ModelConfig(location=supervisor_process.location("s3://models/tiny")),
        "data": DataConfig(train=supervisor_process.location("s3://data/train.jsonl")),
        "output": supervisor_process.location(f"s3://outputs/{remote.setup.folder.name}/v2"),
    }
    ended = supervisor_process.supervise(
        remote.setup.with_changes(**anonymous).run(), remote.setup.folder, environment=remote.s3.environment()
    )
    assert ended.code == 0, ended.output


def test_the_administrators_endpoint_is_used_if_the_secret_names_none(remote: Remote) -> None:
    (remote.keys / "AWS_ENDPOINT_URL").unlink()
    there = S3Config(endpoint=remote.s3.endpoint, region="us-east-1", allow_http=True)
    ended = supervisor_process.supervise(remote.setup.with_changes(s3=there).run(), remote.setup.folder)
    assert ended.code == 0, ended.output


def test_a_bucket_that_is_not_there_is_named_before_training(remote: Remote) -> None:
    location = supervisor_process.location("s3://nowhere/v1", remote.keys)
    code, reason, message = failed(remote.with_changes(output=location))
    assert (code, reason) == (67, "OutputNotFound")
    assert "output.uri: s3://nowhere/v1" in message


def test_missing_data_is_distinguished_from_a_missing_bucket(remote: Remote) -> None:
    missing = DataConfig(train=supervisor_process.location("s3://data/other.jsonl", remote.keys))
    assert failed(remote.with_changes(data=missing))[:2] == (65, "DatasetNotFound")
    bucket = DataConfig(train=supervisor_process.location("s3://nowhere/other.jsonl", remote.keys))
    code, reason, message = failed(remote.with_changes(data=bucket))
    assert (code, reason) == (65, "DatasetNotFound")
    assert "bucket" in message


def test_a_model_that_is_not_there_is_named(remote: Remote) -> None:
    missing = ModelConfig(location=supervisor_process.location("s3://models/other", remote.keys))
    code, reason, message = failed(remote.with_changes(model=missing))
    assert (code, reason) == (66, "ModelNotFound")
    assert "s3://models/other" in message


def test_a_wrong_key_is_access_denied(remote: Remote) -> None:
    (remote.keys / "AWS_SECRET_ACCESS_KEY").write_text("wrong")
    assert failed(remote)[:2] == (68, "AccessDenied")


@pytest.mark.parametrize("part", ["model", "data", "output"])
def test_an_unknown_key_is_access_denied_even_if_the_store_answers_404(remote: Remote, part: str) -> None:
    unknown = {**remote.s3.environment(), "AWS_ACCESS_KEY_ID": "nobody"}
    keys = supervisor_process.secret(remote.setup.folder / "unknown", unknown)
    parts: dict[str, object] = {
        "model": ModelConfig(location=supervisor_process.location("s3://models/tiny", keys)),
        "data": DataConfig(train=supervisor_process.location("s3://data/train.jsonl", keys)),
        "output": supervisor_process.location("s3://outputs/unknown/v1", keys),
    }
    assert failed(remote.with_changes(**{part: parts[part]}))[:2] == (68, "AccessDenied")


def test_half_a_key_is_named(remote: Remote) -> None:
    (remote.keys / "AWS_SECRET_ACCESS_KEY").unlink()
    code, reason, message = failed(remote)
    assert (code, reason) == (68, "CredentialsMissing")
    assert "output.credentialsRef: the Secret has no key AWS_SECRET_ACCESS_KEY" in message


def test_no_keys_at_all_is_refused_by_the_store(remote: Remote) -> None:
    there = S3Config(endpoint=remote.s3.endpoint, region="us-east-1", allow_http=True)
    place = supervisor_process.location("s3://outputs/anonymous/v1")
    assert failed(remote.with_changes(s3=there, output=place))[:2] == (68, "AccessDenied")


def test_another_jobs_result_and_another_jobs_checkpoint_are_refused(remote: Remote) -> None:
    assert supervisor_process.supervise(remote.setup.run(), remote.setup.folder).code == 0
    ended = supervisor_process.supervise(remote.setup.run(uid="uid-2"), remote.setup.folder)
    assert ended.last.reason == "OutputOccupied"
    manifest = remote.output / "finetune" / "manifest.json"
    text = json.loads(manifest.read_text())
    manifest.unlink()
    step = remote.output / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps({**text, "kind": "checkpoint"}))
    ended = supervisor_process.supervise(remote.setup.run(uid="uid-2"), remote.setup.folder)
    assert (ended.code, ended.last.reason) == (67, "OutputOccupied")
    assert "checkpoint after step 2 of ns/job, a deleted FineTuneJob" in ended.last.message


def test_a_result_that_cannot_be_uploaded_is_tried_again_without_training_again(remote: Remote) -> None:
    with Relay(remote.s3.endpoint) as relay:
        (remote.keys / "AWS_ENDPOINT_URL").write_text(relay.url)
        hold = {"hold": str(remote.setup.folder / "go"), "hold_at": 4, "checkpoint_every": 9}
        running = supervisor_process.start(remote.setup.run(), remote.setup.folder, behavior=hold)
        events = remote.setup.folder / "scratch/events/rank-0.jsonl"
        supervisor_process.wait_until(lambda: events.exists() and '"step":4' in events.read_text())
        relay.cut()
        (remote.setup.folder / "go").touch()
        supervisor_process.wait_until(lambda: '"saved"' in events.read_text())
        supervisor_process.wait_until(lambda: relay.refused > 7)  # one request and its retries
        relay.restore()
        ended = running.wait(timeout=90)
    assert ended.code == 0, ended.output
    assert "is tried again" in ended.output
    assert ended.output.count("ranks started") == 1
    assert supervisor_process.manifest(remote.output).step == 4


def test_a_checkpoint_that_cannot_be_uploaded_does_not_disturb_training(remote: Remote) -> None:
    with Relay(remote.s3.endpoint) as relay:
        (remote.keys / "AWS_ENDPOINT_URL").write_text(relay.url)
        hold = {"hold": str(remote.setup.folder / "go"), "hold_at": 1, "checkpoint_every": 1, "steps": 6}
        running = supervisor_process.start(remote.setup.run(), remote.setup.folder, behavior=hold)
        supervisor_process.wait_until(lambda: (remote.output / "checkpoints/step-1/manifest.json").exists())
        relay.cut()
        (remote.setup.folder / "go").touch()
        events = remote.setup.folder / "scratch/events/rank-0.jsonl"
        supervisor_process.wait_until(lambda: '"saved"' in events.read_text())
        relay.restore()
        ended = running.wait(timeout=90)
    assert ended.code == 0, ended.output


def test_a_store_that_never_answers_is_storage_unavailable(remote: Remote) -> None:
    (remote.keys / "AWS_ENDPOINT_URL").write_text("http://127.0.0.1:9")
    code, reason, message = failed(remote, "preflight")
    assert (code, reason) == (74, "StorageUnavailable")
    assert "output.uri" in message


@pytest.mark.parametrize("damage", ["torn file", "torn manifest", "missing file", "other bytes"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(remote: Remote, damage: str) -> None:
    behavior = {"steps": 4, "checkpoint_every": 1, "seconds": 0.3, "at_step": 4, "then": "exit", "attempt": 1}
    ended = supervisor_process.supervise(remote.setup.run(), remote.setup.folder, behavior=behavior)
    assert ended.code != 0
    newest = remote.output / "checkpoints" / "step-3"
    weights = newest / "weights.safetensors"
    match damage:
        case "torn file":
            weights.write_bytes(weights.read_bytes()[:500])
        case "torn manifest":
            (newest / "manifest.json").write_text('{"version": 1, "kind"')
        case "missing file":
            weights.unlink()
        case "other bytes":
            weights.write_bytes(b"x" * weights.stat().st_size)
    ended = supervisor_process.supervise(remote.setup.run(attempt=2), remote.setup.folder, behavior=behavior)
    assert ended.code == 0, ended.output
    assert "checkpoints/step-3 is skipped" in ended.output
    assert '"step": 2' in next(line for line in ended.output.splitlines() if "resuming from" in line)


def test_a_pod_that_is_killed_again_and_again_still_leaves_one_complete_history_and_a_verified_result(
    remote: Remote,
) -> None:
    behavior = {"steps": 8, "checkpoint_every": 1, "seconds": 0.1}
    for attempt, seconds in enumerate((0.3, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 0.9), start=1):
        running = supervisor_process.start(remote.setup.run(attempt=attempt), remote.setup.folder, behavior=behavior)
        time.sleep(seconds)
        running.process.kill()
        running.process.communicate()
    ended = supervisor_process.supervise(remote.setup.run(attempt=20), remote.setup.folder, behavior=behavior)
    assert ended.code == 0, ended.output
    manifest = supervisor_process.manifest(remote.output)
    for file in manifest.files:
        assert of_file(remote.output / file.path) == file.sha256
    lines = [json.loads(line) for line in (remote.output / "finetune/history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["type"] == "step"] == list(range(1, 9))
    assert not list((remote.output / "checkpoints").rglob("*.json"))
