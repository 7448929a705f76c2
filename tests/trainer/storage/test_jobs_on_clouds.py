"""The supervisor against Google Cloud Storage and Azure's blob storage, as test_s3.py has it for
S3: inputs and the result are in buckets, keys come from a mounted Secret, and the store fails."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest

from finetune_api.messages.manifest import Manifest
from finetune_api.messages.run import AzureConfig, DataConfig, GcsConfig, ModelConfig
from finetune_cli.main import main
from trainer.storage.conftest import ObjectStore
from trainer.support import supervisor_process
from trainer.support.network_outage import Relay
from trainer.support.supervisor_process import JobSetup


@dataclass(frozen=True)
class Remote:
    """A job whose model, rows and result are in a store; `prefix` is that of its result."""

    setup: JobSetup
    store: ObjectStore
    keys: Path
    prefix: str

    @property
    def outputs(self) -> Any:
        return self.store.client("outputs")

    def paths(self) -> list[str]:
        listed = obstore.list(self.outputs, prefix=self.prefix).collect()
        return sorted(str(item["path"]).removeprefix(f"{self.prefix}/") for item in listed)

    def read(self, path: str) -> bytes:
        return bytes(obstore.get(self.outputs, f"{self.prefix}/{path}").bytes())

    def with_changes(self, **changes: object) -> Remote:
        return Remote(self.setup.with_changes(**changes), self.store, self.keys, self.prefix)

    def failed(self) -> tuple[int, str, str]:
        ended = supervisor_process.supervise(self.setup.run(), self.setup.folder)
        return ended.code, ended.last.reason, ended.last.message


@pytest.fixture(params=["gs", "az"])
def remote(request: pytest.FixtureRequest, object_stores: dict[str, ObjectStore], tmp_path: Path) -> Remote:
    store = object_stores[request.param]
    model = supervisor_process.small_model(tmp_path / "model")
    for file in model.iterdir():
        obstore.put(store.client("models"), f"tiny/{file.name}", file)
    obstore.put(store.client("data"), "train.jsonl", supervisor_process.ROWS.encode())
    keys = supervisor_process.secret(tmp_path / "keys", store.keys())
    setup = JobSetup(tmp_path).with_changes(
        model=ModelConfig(location=supervisor_process.location(store.uri("models", "tiny"), keys)),
        data=DataConfig(train=supervisor_process.location(store.uri("data", "train.jsonl"), keys)),
        output=supervisor_process.location(store.uri("outputs", f"{tmp_path.name}/v1"), keys),
        gcs=GcsConfig(allow_http=True),
        azure=AzureConfig(allow_http=True),
    )
    return Remote(setup, store, keys, f"{tmp_path.name}/v1")


def test_a_job_reads_writes_and_owns_its_result(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = supervisor_process.supervise(remote.setup.run(), remote.setup.folder)
    assert ended.code == 0, ended.output
    assert remote.read("adapter_model.safetensors") == b"weights after 4"
    assert Manifest.model_validate_json(remote.read("finetune/manifest.json")).step == 4
    assert not any(path.startswith("checkpoints/") for path in remote.paths())
    assert not any(value in ended.output for name, value in remote.store.keys().items() if "KEY" in name)

    other = supervisor_process.supervise(remote.setup.run(uid="uid-2"), remote.setup.folder)
    assert (other.code, other.last.reason) == (67, "OutputOccupied")

    for name, value in remote.store.keys().items():  # as a person has them, who has the JSON in a file
        monkeypatch.setenv(name, str(remote.keys / name) if name == "GOOGLE_APPLICATION_CREDENTIALS" else value)
    report = remote.setup.folder / "report.html"
    assert main(["report", remote.store.uri("outputs", remote.prefix), "--out", str(report)]) == 0
    assert "<html" in report.read_text()


@pytest.mark.parametrize("damage", ["torn manifest", "missing file", "other bytes"])
def test_a_job_resumes_from_the_newest_checkpoint_that_is_whole(remote: Remote, damage: str) -> None:
    behavior = {"steps": 4, "checkpoint_every": 1, "seconds": 0.3, "at_step": 4, "then": "exit", "attempt": 1}
    ended = supervisor_process.supervise(remote.setup.run(), remote.setup.folder, behavior=behavior)
    assert ended.code != 0
    step = f"{remote.prefix}/checkpoints/step-3"
    match damage:
        case "torn manifest":
            obstore.put(remote.outputs, f"{step}/manifest.json", b'{"version": 1, "kind"')
        case "missing file":
            obstore.delete(remote.outputs, f"{step}/weights.safetensors")
        case "other bytes":
            size = len(remote.read("checkpoints/step-3/weights.safetensors"))
            obstore.put(remote.outputs, f"{step}/weights.safetensors", b"x" * size)
    ended = supervisor_process.supervise(remote.setup.run(attempt=2), remote.setup.folder, behavior=behavior)
    assert ended.code == 0, ended.output
    assert "checkpoints/step-3 is skipped" in ended.output
    assert '"step": 2' in next(line for line in ended.output.splitlines() if "resuming from" in line)
    lines = [json.loads(line) for line in remote.read("finetune/history.jsonl").decode().splitlines()]
    assert [line["step"] for line in lines if line["type"] == "step"] == [1, 2, 3, 4]


def test_a_result_that_cannot_be_uploaded_is_tried_again_without_training_again(remote: Remote) -> None:
    with Relay(remote.store.server.endpoint) as relay:
        endpoint = remote.keys / remote.store.endpoint_key
        endpoint.write_text(remote.store.endpoint_at(relay.url))
        hold = {"hold": str(remote.setup.folder / "go"), "hold_at": 4, "checkpoint_every": 9}
        running = supervisor_process.start(remote.setup.run(), remote.setup.folder, behavior=hold)
        events = remote.setup.folder / "scratch/events/rank-0.jsonl"
        supervisor_process.wait_until(lambda: events.exists() and '"step":4' in events.read_text(), timeout=60)
        relay.cut()
        (remote.setup.folder / "go").touch()
        supervisor_process.wait_until(lambda: '"saved"' in events.read_text(), timeout=60)
        supervisor_process.wait_until(lambda: relay.refused > 7, timeout=60)  # one request and its retries
        relay.restore()
        ended = running.wait(timeout=180)
    assert ended.code == 0, ended.output
    assert ended.output.count("ranks started") == 1
    assert remote.read("adapter_model.safetensors") == b"weights after 4"


def test_what_is_missing_is_named_before_training(remote: Remote) -> None:
    def place(bucket: str, path: str) -> Any:
        return supervisor_process.location(remote.store.uri(bucket, path), remote.keys)

    nowhere = remote.with_changes(output=place("nowhere", "v1"))
    code, reason, message = nowhere.failed()
    assert (code, reason) == (67, "OutputNotFound")
    assert f"output.uri: {remote.store.uri('nowhere', 'v1')}" in message
    assert remote.with_changes(data=DataConfig(train=place("data", "other.jsonl"))).failed()[:2] == (
        65,
        "DatasetNotFound",
    )
    assert remote.with_changes(model=ModelConfig(location=place("models", "other"))).failed()[:2] == (
        66,
        "ModelNotFound",
    )


def test_a_secret_without_keys_is_named(remote: Remote) -> None:
    proof = "GOOGLE_APPLICATION_CREDENTIALS" if remote.store.scheme == "gs" else "AZURE_STORAGE_KEY"
    (remote.keys / proof).unlink()
    code, reason, message = remote.failed()
    assert (code, reason) == (68, "CredentialsMissing")
    assert "credentialsRef: the Secret has" in message
    assert proof in message
