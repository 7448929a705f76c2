"""Which credentials, account and endpoint are used to open a gs:// bucket or an az:// container."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.messages.run import AzureConfig, GcsConfig
from finetune_trainer.errors import RunError
from finetune_trainer.storage import azure, gcs

ACCOUNT = {"type": "service_account", "client_email": "a@b", "private_key": "PRIVATE", "private_key_id": "1"}
KEY = {"GOOGLE_APPLICATION_CREDENTIALS": json.dumps(ACCOUNT)}
MINE = GcsConfig(endpoint="http://gcs:9000", allow_http=True)
Environment = dict[str, str]
Expected = dict[str, Any]

GOOGLE: dict[str, tuple[GcsConfig, dict[str, str] | None, Environment, Expected]] = {
    "the Secret's key": (GcsConfig(), KEY, {"GOOGLE_BASE_URL": "https://env"}, {
        "service_account_key": json.dumps(ACCOUNT), "base_url": "https://env", "skip_signature": None}),
    "a key can't name a server": (
        GcsConfig(), {"GOOGLE_APPLICATION_CREDENTIALS": json.dumps(
            {**ACCOUNT, "gcs_base_url": "http://evil", "disable_oauth": True, "token_uri": "http://evil"})}, {},
        {"service_account_key": json.dumps(ACCOUNT), "base_url": None}),
    "the Secret's endpoint wins": (MINE, {**KEY, "GOOGLE_BASE_URL": "https://own/"}, {}, {"base_url": "https://own"}),
    "the administrator's endpoint": (MINE, KEY, {"GOOGLE_BASE_URL": "http://env"}, {"base_url": "http://gcs:9000"}),
    "the pod's identity": (GcsConfig(), None, {}, {
        "service_account_key": None, "skip_signature": None, "base_url": None}),
    "the pod's identity at a private endpoint of Google": (
        GcsConfig(), {"GOOGLE_BASE_URL": "https://storage-x.p.googleapis.com"}, {}, {
            "base_url": "https://storage-x.p.googleapis.com", "skip_signature": None}),
    "the pod's identity at the administrator's endpoint": (
        MINE, None, {"GCE_METADATA_HOST": "metadata"}, {"skip_signature": None, "base_url": "http://gcs:9000"}),
    "the environment's key": (
        MINE, None, {"GOOGLE_APPLICATION_CREDENTIALS": "/key.json"}, {"skip_signature": None}),
    "nobody's key at another server": (MINE, None, {}, {"skip_signature": True}),
}  # fmt: skip

BARE = {"AZURE_STORAGE_ACCOUNT": "mine"}
CLIENT = {"AZURE_TENANT_ID": "t", "AZURE_CLIENT_ID": "c", "AZURE_CLIENT_SECRET": "s"}
AKS = {"AZURE_TENANT_ID": "t", "AZURE_CLIENT_ID": "c", "AZURE_FEDERATED_TOKEN_FILE": "/token",
       "AZURE_AUTHORITY_HOST": "https://login.microsoftonline.com/"}  # fmt: skip
AZURITE = AzureConfig(account="operators", endpoint="http://azurite:10000/operators", allow_http=True)

AZURE: dict[str, tuple[AzureConfig, dict[str, str] | None, Environment, Expected]] = {
    "the account's key": (AzureConfig(), {**BARE, "AZURE_STORAGE_KEY": "k"}, AKS, {
        "account_name": "mine", "credential_type": "access_key", "account_key": "k", "endpoint": None,
        "federated_token_file": None}),
    "the other names of account and key": (
        AzureConfig(), {"AZURE_STORAGE_ACCOUNT_NAME": "mine", "AZURE_STORAGE_ACCOUNT_KEY": "k"}, {}, {
            "account_name": "mine", "account_key": "k"}),
    "a signature wins over the pod's identity": (AzureConfig(), {**BARE, "AZURE_STORAGE_SAS_TOKEN": "?sv=1"}, AKS, {
        "credential_type": "sas_token", "sas_key": "?sv=1", "federated_token_file": None}),
    "a client secret": (AzureConfig(), {**BARE, **CLIENT}, AKS, {
        "credential_type": "client_secret", "client_secret": "s", "tenant_id": "t", "client_id": "c",
        "authority_host": None}),
    "a key before a signature": (
        AzureConfig(), {**BARE, "AZURE_STORAGE_KEY": "k", "AZURE_STORAGE_SAS_TOKEN": "?sv=1"}, {}, {
            "credential_type": "access_key"}),
    "the pod's identity on AKS": (AzureConfig(account="operators"), None, AKS, {
        "account_name": "operators", "credential_type": "workload_identity", "federated_token_file": "/token",
        "tenant_id": "t", "client_id": "c", "authority_host": "https://login.microsoftonline.com"}),
    "a Secret that names the account and the identity": (
        AzureConfig(account="operators"), {**BARE, "AZURE_CLIENT_ID": "other"}, AKS, {
            "account_name": "mine", "client_id": "other", "credential_type": "workload_identity"}),
    "the identity of a virtual machine": (AzureConfig(), BARE, {}, {
        "credential_type": "managed_identity", "client_id": None, "skip_signature": None}),
    "the environment's key": (AzureConfig(), None, {**BARE, "AZURE_STORAGE_KEY": "k"}, {
        "account_name": "mine", "account_key": "k"}),
    "the administrator's endpoint": (
        AZURITE, {"AZURE_STORAGE_KEY": "k"}, {"AZURE_STORAGE_ENDPOINT": "https://env"}, {
            "endpoint": "http://azurite:10000/operators", "account_name": "operators"}),
    "the pod's identity at the administrator's endpoint": (AZURITE, None, AKS, {
        "credential_type": "workload_identity", "endpoint": "http://azurite:10000/operators"}),
    "the pod's identity at another endpoint of Azure": (
        AzureConfig(), {**BARE, "AZURE_STORAGE_ENDPOINT": "https://mine.blob.core.chinacloudapi.cn"}, AKS, {
            "credential_type": "workload_identity"}),
    "nobody's key at another server": (AZURITE, None, {}, {"skip_signature": True, "credential_type": None}),
}  # fmt: skip


@pytest.mark.parametrize(("config", "secret", "environment", "expected"), GOOGLE.values(), ids=GOOGLE)
def test_googles_credentials_and_endpoint_are_used_in_order_of_precedence(
    config: GcsConfig, secret: dict[str, str] | None, environment: Environment, expected: Expected
) -> None:
    options = gcs.access_options(config, secret, environment)
    assert {key: options.get(key) for key in expected} == expected


@pytest.mark.parametrize(("config", "secret", "environment", "expected"), AZURE.values(), ids=AZURE)
def test_azures_credentials_account_and_endpoint_are_used_in_order_of_precedence(
    config: AzureConfig, secret: dict[str, str] | None, environment: Environment, expected: Expected
) -> None:
    options = azure.access_options(config, secret, environment)
    assert {key: options.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", ["GOOGLE_BEARER_TOKEN", "GOOGLE_SERVICE_ACCOUNT", "SERVICE_ACCOUNT"])
def test_a_variable_that_obstore_would_prefer_to_the_secret_is_named(name: str) -> None:
    with pytest.raises(RunError, match=f"the pod's {name} would be used instead of the Secret") as refused:
        gcs.access_options(GcsConfig(), KEY, {name: "PRIVATE"})
    assert refused.value.reason == "InvalidConfig"
    assert "PRIVATE" not in refused.value.message


def _account(**changes: object) -> dict[str, str]:
    return {"GOOGLE_APPLICATION_CREDENTIALS": json.dumps({**ACCOUNT, **changes})}


@pytest.mark.parametrize(
    ("secret", "reason", "explanation"),
    [
        ({}, "CredentialsMissing", "has no key GOOGLE_APPLICATION_CREDENTIALS"),
        ({"key.json": "{}"}, "CredentialsMissing", "has no key GOOGLE_APPLICATION_CREDENTIALS"),
        ({"GOOGLE_APPLICATION_CREDENTIALS": "PRIVATE"}, "CredentialsMissing", "isn't JSON"),
        ({"GOOGLE_APPLICATION_CREDENTIALS": '["PRIVATE"]'}, "CredentialsMissing", "has the type None"),
        (_account(type="external_account"), "CredentialsMissing", "has the type external_account"),
        (_account(private_key=""), "CredentialsMissing", "lacks private_key"),
        (_account(client_email=7), "CredentialsMissing", "lacks client_email"),
        # the token of the pod's identity isn't sent to a server that a Secret names
        ({"GOOGLE_BASE_URL": "https://elsewhere"}, "CredentialsMissing", "has no key GOOGLE_APPLICATION_CREDENTIALS"),
        ({"GOOGLE_BASE_URL": "https://googleapis.com.evil"}, "CredentialsMissing", "has no key"),
        ({**KEY, "GOOGLE_BASE_URL": "http://evil"}, "InvalidConfig", "the Secret's GOOGLE_BASE_URL http://evil"),
        ({**KEY, "GOOGLE_BASE_URL": "HTTP://evil"}, "InvalidConfig", "storage.gcs.allowHttp"),
    ],
)
def test_googles_secret_is_refused_rather_than_ignored(secret: dict[str, str], reason: str, explanation: str) -> None:
    with pytest.raises(RunError) as refused:
        gcs.access_options(GcsConfig(), secret, {"GCE_METADATA_HOST": "metadata"})
    assert (refused.value.reason, explanation in refused.value.message) == (reason, True), refused.value.message
    assert "PRIVATE" not in refused.value.message


@pytest.mark.parametrize(
    ("secret", "reason", "explanation"),
    [
        ({}, "CredentialsMissing", "neither AZURE_STORAGE_KEY nor AZURE_STORAGE_SAS_TOKEN nor AZURE_CLIENT_SECRET"),
        ({**BARE, "password": "x"}, "CredentialsMissing", "neither AZURE_STORAGE_KEY"),
        ({**BARE, "AZURE_STORAGE_KEY": ""}, "CredentialsMissing", "neither AZURE_STORAGE_KEY"),
        ({**BARE, "AZURE_CLIENT_SECRET": "x"}, "CredentialsMissing", "no AZURE_TENANT_ID and no AZURE_CLIENT_ID"),
        # the token of the pod's identity isn't sent to a server that a Secret names
        ({**BARE, "AZURE_STORAGE_ENDPOINT": "https://elsewhere"}, "CredentialsMissing", "neither AZURE_STORAGE_KEY"),
        ({**BARE, "AZURE_STORAGE_ENDPOINT": "https://core.windows.net.evil"}, "CredentialsMissing", "neither"),
        ({"AZURE_STORAGE_ACCOUNT": "evil.com/"}, "InvalidConfig", "3 to 24 lowercase letters"),
        ({"AZURE_STORAGE_ACCOUNT": "a.evil.com#"}, "InvalidConfig", "3 to 24 lowercase letters"),
        ({**BARE, "AZURE_STORAGE_KEY": "k", "AZURE_STORAGE_ENDPOINT": "http://evil"}, "InvalidConfig",
         "the Secret's AZURE_STORAGE_ENDPOINT http://evil"),
    ],
)  # fmt: skip
def test_azures_secret_is_refused_rather_than_ignored(secret: dict[str, str], reason: str, explanation: str) -> None:
    with pytest.raises(RunError) as refused:
        azure.access_options(AzureConfig(account="operators"), secret, AKS)
    assert (refused.value.reason, explanation in refused.value.message) == (reason, True), refused.value.message


def test_a_container_needs_the_name_of_an_account() -> None:
    with pytest.raises(RunError, match="add AZURE_STORAGE_ACCOUNT to the Secret") as refused:
        azure.access_options(AzureConfig(), None, AKS)
    assert refused.value.reason == "CredentialsMissing"


@pytest.mark.parametrize("name", ["AZURE_TENANT_ID", "AZURE_CLIENT_ID"])
def test_half_an_identity_is_named(name: str) -> None:
    environment = {key: value for key, value in AKS.items() if key != name}
    with pytest.raises(RunError, match=f"the pod has no {name}") as refused:
        azure.access_options(AzureConfig(account="mine"), None, environment)
    assert refused.value.reason == "CredentialsMissing"
