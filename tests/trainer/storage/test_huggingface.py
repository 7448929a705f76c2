"""hf:// models: the real huggingface_hub client against a small hub on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune_api.messages.run import DataConfig, ModelConfig
from testkit.hub_server import Hub, Repository, running_hub
from trainer.support import supervisor_process
from trainer.support.supervisor_process import FinishedSupervisor, JobSetup


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    setup = JobSetup(tmp_path).write_inputs()
    (setup.model / "pytorch_model.bin").write_bytes(b"evil")
    return setup


def run_from(
    setup: JobSetup, hub: Hub, uri: str, *, revision: str | None = None, keys: Path | None = None
) -> FinishedSupervisor:
    model = ModelConfig(location=supervisor_process.location(uri, keys, revision))
    environment = hub.environment(setup.folder / "home")
    return supervisor_process.supervise(setup.with_changes(model=model).run(), setup.folder, environment=environment)


def test_a_model_is_fetched_at_the_commit_that_its_revision_refers_to(setup: JobSetup) -> None:
    with running_hub({"org/tiny": Repository(setup.model, revisions=("main", "v1"))}) as hub:
        ended = run_from(setup, hub, "hf://org/tiny", revision="v1")
        assert ended.code == 0, ended.output
        assert not any("pytorch_model.bin" in request for request in hub.requests)
    commit = Repository(setup.model).commit()
    assert ended.last.model is not None
    assert ended.last.model.revision == commit
    manifest = supervisor_process.manifest(setup.output)
    assert manifest.provenance["model"]["revision"] == commit
    assert manifest.provenance["model"]["uri"] == "hf://org/tiny"


def test_rows_are_fetched_from_a_data_set(setup: JobSetup) -> None:
    folder = setup.folder / "rows"
    folder.mkdir()
    shutil.copy(setup.train, folder / "rows.jsonl")
    data = DataConfig(train=supervisor_process.location("hf://org/rows/rows.jsonl"))
    with running_hub({"datasets/org/rows": Repository(folder)}) as hub:
        run = setup.with_changes(data=data).run()
        ended = supervisor_process.supervise(run, setup.folder, environment=hub.environment(setup.folder / "home"))
        assert ended.code == 0, ended.output
        assert any("/datasets/org/rows/resolve/" in request for request in hub.requests)


def test_the_same_files_have_the_same_digest_from_any_source(setup: JobSetup) -> None:
    with running_hub({"org/tiny": Repository(setup.model)}) as hub:
        remote = run_from(setup, hub, "hf://org/tiny")
    local = supervisor_process.supervise(
        setup.with_changes(output=supervisor_process.location(f"file://{setup.folder}/out2")).run(), setup.folder
    )
    assert remote.last.model is not None
    assert local.last.model is not None
    assert remote.last.model.digest == local.last.model.digest


def test_a_private_model_needs_the_secrets_token(setup: JobSetup) -> None:
    keys = supervisor_process.secret(setup.folder / "keys", {"HF_TOKEN": "hf_right"})
    with running_hub({"org/tiny": Repository(setup.model, token="hf_right")}) as hub:
        without = run_from(setup, hub, "hf://org/tiny")
        assert (without.code, without.last.reason) == (66, "ModelNotFound")
        assert "HF_TOKEN" in without.last.message
        assert run_from(setup, hub, "hf://org/tiny", keys=keys).code == 0


def test_a_gated_model_is_access_denied(setup: JobSetup) -> None:
    keys = supervisor_process.secret(setup.folder / "keys", {"HF_TOKEN": "hf_other"})
    with running_hub({"org/tiny": Repository(setup.model, token="hf_right", gated=True)}) as hub:
        ended = run_from(setup, hub, "hf://org/tiny", keys=keys)
    assert (ended.code, ended.last.reason) == (68, "AccessDenied")
    assert "license" in ended.last.message


def test_a_secret_without_the_key_is_named(setup: JobSetup) -> None:
    keys = supervisor_process.secret(setup.folder / "keys", {"TOKEN": "x"})
    with running_hub({"org/tiny": Repository(setup.model)}) as hub:
        ended = run_from(setup, hub, "hf://org/tiny", keys=keys)
    assert (ended.code, ended.last.reason) == (68, "CredentialsMissing")
    assert "model.credentialsRef: the Secret has no key HF_TOKEN" in ended.last.message


def test_what_the_hub_does_not_have_is_named(setup: JobSetup) -> None:
    with running_hub({"org/tiny": Repository(setup.model)}) as hub:
        absent = run_from(setup, hub, "hf://org/other")
        assert (absent.code, absent.last.reason) == (66, "ModelNotFound")
        assert "hf://org/other" in absent.last.message
        revision = run_from(setup, hub, "hf://org/tiny", revision="v9")
        assert (revision.code, revision.last.reason) == (66, "ModelNotFound")
        assert "'v9'" in revision.last.message


def test_a_hub_that_cannot_be_reached_is_storage_unavailable(setup: JobSetup) -> None:
    hub = Hub(endpoint="http://127.0.0.1:9", repositories={})
    ended = run_from(setup, hub, "hf://org/tiny")
    assert (ended.code, ended.last.reason) == (74, "StorageUnavailable")
    assert "hub" in ended.last.message
