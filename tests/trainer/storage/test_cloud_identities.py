"""Each kind of credential opens a real server of its store, and a wrong one is told apart from a
missing one: the metadata server of GKE, and the authority that AKS exchanges tokens with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.messages.run import AzureConfig, GcsConfig, S3Config
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import Storage
from finetune_trainer.storage.schemes import Access, open_folder
from testkit import azure_server, certificates
from testkit.azure_server import Azure, running_authority, running_azure
from testkit.gcs_server import Gcs
from trainer.storage.conftest import ObjectStore
from trainer.support import supervisor_process


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificate of localhost."""
    folder = tmp_path_factory.mktemp("tls")
    certificates.localhost(folder)
    return folder


@pytest.fixture(scope="module")
def azure(tls: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azure]:
    """Azurite with TLS, since it accepts tokens only over TLS."""
    with running_azure(tmp_path_factory.mktemp("azure"), ("outputs",), certificate=tls / "server") as server:
        yield server


@pytest.fixture(scope="module")
def authority() -> Iterator[str]:
    with running_authority() as url:
        yield url


def opened(uri: str, secret: Path | None, environment: dict[str, str], gcs: GcsConfig | None = None) -> Storage:
    access = Access(
        S3Config(), environment, gcs or GcsConfig(), AzureConfig(allow_http=True), retries=0, retry_seconds=5.0
    )
    return open_folder(supervisor_process.location(uri, secret), "output", access)


AZURE_PROOFS = {
    "an account's key": {"AZURE_STORAGE_KEY": azure_server.ACCOUNT_KEY},
    "a signature": {"AZURE_STORAGE_SAS_TOKEN": azure_server.sas()},
    "a client secret": {
        "AZURE_TENANT_ID": azure_server.TENANT, "AZURE_CLIENT_ID": azure_server.CLIENT,
        "AZURE_CLIENT_SECRET": azure_server.CLIENT_SECRET},
    "a federated identity": {},
}  # fmt: skip
WRONG = "d3Jvbmc="


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("kind", AZURE_PROOFS)
def test_each_kind_of_credential_opens_azure(
    kind: str, wrong: bool, azure: Azure, authority: str, tls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls / "ca.crt"))
    token = tmp_path / "token"
    token.write_text("another cluster's" if wrong else azure_server.FEDERATED_TOKEN)
    proof = dict(AZURE_PROOFS[kind])
    secret = environment = {}
    if proof:
        last = list(proof)[-1]
        wrong_value = azure_server.sas(key=WRONG) if "SAS" in last else WRONG
        secret = {**azure.place(), **proof, **({last: wrong_value} if wrong else {}), "AZURE_AUTHORITY_HOST": authority}
    else:  # what AKS adds to a pod; the endpoint is the administrator's
        environment = {
            **azure.place(), "AZURE_TENANT_ID": azure_server.TENANT, "AZURE_CLIENT_ID": azure_server.CLIENT,
            "AZURE_FEDERATED_TOKEN_FILE": str(token), "AZURE_AUTHORITY_HOST": f"{authority}/",
        }  # fmt: skip
    keys = supervisor_process.secret(tmp_path / "keys", secret) if secret else None
    storage = opened(f"az://outputs/{tmp_path.name}", keys, environment)
    if wrong:
        with pytest.raises(RunError) as refused:
            storage.write("a", b"1")
        assert refused.value.reason == "AccessDenied", refused.value.message
        secrets = [*proof.values(), WRONG, "another cluster's"]
        assert not any(value in refused.value.message for value in secrets if value)
        assert "client" not in kind or "Invalid client secret provided" in refused.value.message
    else:
        storage.write("a", b"1")
        assert storage.create("a", b"2") is False
        if "signature" not in kind:  # Azurite 3.37 responds to a signed batch with 500; Azure accepts it
            storage.delete(("a", "b"))
            assert storage.list() == ()


def test_a_signature_that_may_only_read_is_access_denied_when_it_writes(
    azure: Azure, tls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls / "ca.crt"))
    signature = azure_server.sas(permissions="rl")
    keys = supervisor_process.secret(tmp_path / "keys", {**azure.place(), "AZURE_STORAGE_SAS_TOKEN": signature})
    storage = opened(f"az://outputs/{tmp_path.name}", keys, {})
    assert storage.list() == ()
    with pytest.raises(RunError) as refused:
        storage.write("a", b"1")
    assert refused.value.reason == "AccessDenied"
    assert signature.partition("sig=")[2] not in refused.value.message


def test_the_metadata_server_gives_the_identity_of_a_pod_on_gke(
    object_stores: dict[str, ObjectStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = object_stores["gs"].server
    assert isinstance(server, Gcs)
    host = server.endpoint.removeprefix("http://")
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    monkeypatch.setenv("GCE_METADATA_IP", host)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(server, "identity", "a pod's token")
    config = GcsConfig(endpoint=server.endpoint, allow_http=True)
    uri, environment = f"gs://outputs/{tmp_path.name}", {"GCE_METADATA_HOST": host}
    storage = opened(uri, None, environment, config)
    storage.write("a", b"1")
    assert storage.read("a") == b"1"

    monkeypatch.setattr(server, "identity", None)
    with pytest.raises(RunError, match="give the pod an identity") as refused:
        opened(uri, None, environment, config).read("a")
    assert refused.value.reason == "CredentialsMissing"
    with pytest.raises(RunError) as anonymous:
        opened(uri, None, {}, config).list()
    assert anonymous.value.reason == "AccessDenied"


@pytest.mark.parametrize(
    ("scheme", "changes", "reason", "message"),
    [
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": '{"type": "service_account", "client_email": "a", '
                                                  '"private_key": "PRIVATE", "private_key_id": "1"}'},
         "CredentialsMissing", "the credentials or the endpoint can't be used"),
        ("az", {"AZURE_STORAGE_KEY": "PRIVATE-"},
         "CredentialsMissing", "the credentials or the endpoint can't be used"),
        ("az", {"AZURE_STORAGE_ENDPOINT": "nonsense"},
         "InvalidConfig", "the Secret's AZURE_STORAGE_ENDPOINT isn't a URL"),
    ],
)  # fmt: skip
def test_credentials_of_the_wrong_form_are_named_and_not_shown(
    object_stores: dict[str, ObjectStore],
    scheme: str,
    changes: dict[str, str | None],
    reason: str,
    message: str,
    tmp_path: Path,
) -> None:
    store = object_stores[scheme]
    keys = supervisor_process.secret(tmp_path / "keys", store.keys(**changes))
    with pytest.raises(RunError, match=message) as refused:
        opened(store.uri("outputs", "v1"), keys, {}, GcsConfig(allow_http=True))
    assert refused.value.reason == reason
    assert "PRIVATE" not in refused.value.message
