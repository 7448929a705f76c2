"""Which keys, endpoint and region are used to open a bucket."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.messages.run import S3Config
from finetune_trainer.errors import RunError
from finetune_trainer.storage.s3 import access_options

KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s"}
IDENTITY = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/t"}
MINE = S3Config(endpoint="http://s3:9000", region="eu-central-1", allow_http=True)

ACCESS: dict[str, tuple[S3Config, dict[str, str] | None, dict[str, str], dict[str, Any]]] = {
    "the Secret's keys": (S3Config(), KEYS, {}, {"access_key_id": "a", "region": "us-east-1", "endpoint": None}),
    "the Secret's endpoint wins": (MINE, {**KEYS, "AWS_ENDPOINT_URL": "https://own"}, {}, {"endpoint": "https://own"}),
    "the administrator's endpoint": (MINE, KEYS, {"AWS_ENDPOINT_URL": "http://env"}, {"endpoint": "http://s3:9000"}),
    "the Secret's region": (MINE, {**KEYS, "AWS_REGION": "r"}, {}, {"region": "r"}),
    "the administrator's region": (MINE, None, {"AWS_REGION": "env"}, {"region": "eu-central-1"}),
    "the pod's region": (S3Config(), None, {"AWS_REGION": "env", "AWS_DEFAULT_REGION": "d"}, {"region": "env"}),
    "the pod's default region": (S3Config(), KEYS, {"AWS_DEFAULT_REGION": "d"}, {"region": "d"}),
    "nobody's region": (S3Config(), None, {"AWS_REGION": ""}, {"region": "us-east-1"}),
    "the Secret's region with the pod's identity": (
        S3Config(region="eu-central-1"), {"AWS_REGION": "r"}, {**IDENTITY, "AWS_REGION": "env"},
        {"region": "r", "access_key_id": None, "skip_signature": None, "endpoint": None}),
    "the Secret's region with the identity of an EC2 instance": (
        S3Config(), {"AWS_REGION": "r"}, {}, {"region": "r", "access_key_id": None, "skip_signature": None}),
    "the Secret's endpoint with the pod's identity": (
        S3Config(), {"AWS_ENDPOINT_URL": "https://own"}, IDENTITY, {"endpoint": "https://own", "skip_signature": None}),
    "a session token": (MINE, {**KEYS, "AWS_SESSION_TOKEN": "t"}, {}, {"session_token": "t"}),
    "nobody's keys at an own endpoint": (MINE, None, {}, {"skip_signature": True, "access_key_id": None}),
    "the environment's keys": (MINE, None, KEYS, {"skip_signature": None, "access_key_id": None}),
    "the pod's identity": (MINE, None, IDENTITY, {"skip_signature": None}),
    "nobody's keys at AWS": (S3Config(), None, {}, {"skip_signature": None, "endpoint": None}),
}  # fmt: skip


@pytest.mark.parametrize(("config", "secret", "environment", "expected"), ACCESS.values(), ids=ACCESS)
def test_keys_and_endpoint_are_used_in_order_of_precedence(
    config: S3Config, secret: dict[str, str] | None, environment: dict[str, str], expected: dict[str, Any]
) -> None:
    options = access_options(config, secret, environment)
    assert {key: options.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("secret", "environment"),
    [
        ({"password": "x"}, KEYS),
        ({"password": "x", "AWS_REGION": "r"}, IDENTITY),
        ({"HF_TOKEN": "x"}, IDENTITY),
        ({}, IDENTITY),  # a Secret whose keys are all missing isn't no Secret
        ({"AWS_SESSION_TOKEN": "t", "AWS_REGION": "r"}, IDENTITY),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_REGION": "r"}, IDENTITY),
        ({"AWS_REGION": "r"}, {}),  # no identity, and the endpoint isn't AWS: access would be anonymous
    ],
)
def test_a_secret_without_keys_is_refused_rather_than_ignored(
    secret: dict[str, str], environment: dict[str, str]
) -> None:
    with pytest.raises(RunError, match="neither AWS_ACCESS_KEY_ID nor AWS_SECRET_ACCESS_KEY") as refused:
        access_options(MINE, secret, environment)
    assert refused.value.reason == "CredentialsMissing"
    assert "just AWS_REGION or AWS_ENDPOINT_URL" in refused.value.message


@pytest.mark.parametrize(
    ("config", "secret", "named"),
    [
        (S3Config(endpoint="https://s3"), {**KEYS, "AWS_ENDPOINT_URL": "http://evil"}, "the Secret's AWS_ENDPOINT_URL"),
        (S3Config(endpoint="https://s3"), {**KEYS, "AWS_ENDPOINT_URL": "HTTP://evil"}, "the Secret's AWS_ENDPOINT_URL"),
        (S3Config(endpoint="http://s3"), KEYS, "the S3 endpoint http://s3"),
        (S3Config(), None, "the S3 endpoint http://env"),
    ],
)
def test_no_key_is_sent_unencrypted_unless_the_administrator_allows_it(
    config: S3Config, secret: dict[str, str] | None, named: str
) -> None:
    with pytest.raises(RunError, match=named) as refused:
        access_options(config, secret, {"AWS_ENDPOINT_URL": "http://env"})
    assert refused.value.reason == "InvalidConfig"
    assert "https://" in refused.value.message
