"""hf:// models: the real huggingface_hub against a small hub on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.run import ModelConfig
from supervisor import world
from supervisor.world import Ended, Setup
from testkit.hub_server import Hub, Repository, running_hub


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    setup = Setup(tmp_path).write_inputs()
    (setup.model / "pytorch_model.bin").write_bytes(b"evil")
    return setup


def run_from(setup: Setup, hub: Hub, uri: str, *, revision: str | None = None, keys: Path | None = None) -> Ended:
    model = ModelConfig(location=world.place(uri, keys, revision))
    environment = hub.environment(setup.folder / "home")
    return world.supervise(setup.but(model=model).run(), setup.folder, environment=environment)


def test_a_model_is_fetched_at_the_commit_that_its_revision_means(setup: Setup) -> None:
    with running_hub({"org/tiny": Repository(setup.model, revisions=("main", "v1"))}) as hub:
        ended = run_from(setup, hub, "hf://org/tiny", revision="v1")
        assert ended.code == 0, ended.output
        assert not any("pytorch_model.bin" in request for request in hub.requests)
    commit = Repository(setup.model).commit()
    assert ended.last.model is not None
    assert ended.last.model.revision == commit
    manifest = world.manifest(setup.output)
    assert manifest.provenance["model"]["revision"] == commit
    assert manifest.provenance["model"]["uri"] == "hf://org/tiny"


def test_the_same_files_have_the_same_digest_wherever_they_come_from(setup: Setup) -> None:
    with running_hub({"org/tiny": Repository(setup.model)}) as hub:
        remote = run_from(setup, hub, "hf://org/tiny")
    local = world.supervise(setup.but(output=world.place(f"file://{setup.folder}/out2")).run(), setup.folder)
    assert remote.last.model is not None
    assert local.last.model is not None
    assert remote.last.model.digest == local.last.model.digest


def test_a_private_model_needs_the_secrets_token(setup: Setup) -> None:
    keys = world.secret(setup.folder / "keys", {"HF_TOKEN": "hf_right"})
    with running_hub({"org/tiny": Repository(setup.model, token="hf_right")}) as hub:
        without = run_from(setup, hub, "hf://org/tiny")
        assert (without.code, without.last.reason) == (66, "ModelNotFound")
        assert "HF_TOKEN" in without.last.message
        assert run_from(setup, hub, "hf://org/tiny", keys=keys).code == 0


def test_a_gated_model_is_access_denied(setup: Setup) -> None:
    keys = world.secret(setup.folder / "keys", {"HF_TOKEN": "hf_other"})
    with running_hub({"org/tiny": Repository(setup.model, token="hf_right", gated=True)}) as hub:
        ended = run_from(setup, hub, "hf://org/tiny", keys=keys)
    assert (ended.code, ended.last.reason) == (68, "AccessDenied")
    assert "licence" in ended.last.message


def test_a_secret_without_the_key_is_named(setup: Setup) -> None:
    keys = world.secret(setup.folder / "keys", {"TOKEN": "x"})
    with running_hub({"org/tiny": Repository(setup.model)}) as hub:
        ended = run_from(setup, hub, "hf://org/tiny", keys=keys)
    assert (ended.code, ended.last.reason) == (68, "CredentialsMissing")
    assert "model.credentialsRef: the Secret has no key HF_TOKEN" in ended.last.message


def test_what_the_hub_does_not_have_is_named(setup: Setup) -> None:
    with running_hub({"org/tiny": Repository(setup.model)}) as hub:
        absent = run_from(setup, hub, "hf://org/other")
        assert (absent.code, absent.last.reason) == (66, "ModelNotFound")
        assert "hf://org/other" in absent.last.message
        revision = run_from(setup, hub, "hf://org/tiny", revision="v9")
        assert (revision.code, revision.last.reason) == (66, "ModelNotFound")
        assert "'v9'" in revision.last.message


def test_a_hub_that_cannot_be_reached_is_storage_unavailable(setup: Setup) -> None:
    hub = Hub(endpoint="http://127.0.0.1:9", repositories={})
    ended = run_from(setup, hub, "hf://org/tiny")
    assert (ended.code, ended.last.reason) == (74, "StorageUnavailable")
    assert "hub" in ended.last.message
