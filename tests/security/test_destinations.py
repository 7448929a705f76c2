"""Where a pod takes the keys of a Secret: only to servers that the administrator or the Secret
itself names, and never into the inside of the cluster."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.messages.run import MlflowConfig, S3Config, TrackingConfig, WandbConfig
from finetune_operator.core.plan import plan
from finetune_operator.settings import parse
from finetune_trainer.errors import RunError
from finetune_trainer.reporting.trackers.servers import check_mlflow, check_wandb
from finetune_trainer.storage import azure, gcs, s3
from finetune_trainer.storage.allowed_endpoints import addresses, check
from k8s_operator.support.observed_states import a_job

_LISTED = ("https://mlflow.example", "http://mlflow.ml:5000")


@pytest.mark.parametrize(
    ("uri", "with_secret", "secret", "servers", "problem"),
    [
        ("https://evil.example", True, "", (), "isn't the server that the Secret names"),
        ("https://evil.example", True, "https://mlflow.example", (), "isn't the server that the Secret names"),
        ("https://mlflow.example.evil", True, "https://mlflow.example", (), "isn't the server that the Secret names"),
        ("https://mlflow.example", True, "https://mlflow.example/", (), ""),
        ("http://mlflow.example", True, "http://mlflow.example", (), "without encryption"),
        ("http://mlflow:5000", False, "", (), ""),
        ("http://mlflow.ml:5000", True, "", _LISTED, ""),
        ("https://mlflow.example/", True, "", _LISTED, ""),
        ("https://evil.example", True, "https://evil.example", _LISTED, "not among the operator's tenants.trackers"),
        ("https://evil.example", False, "", _LISTED, "not among the operator's tenants.trackers"),
        ("http://anything", True, "", None, ""),
    ],
)
def test_t11_the_keys_of_a_secret_go_only_to_a_server_that_it_or_the_administrator_names(
    uri: str, with_secret: bool, secret: str, servers: tuple[str, ...] | None, problem: str
) -> None:
    mlflow = MlflowConfig(uri=uri, credentials="/secret" if with_secret else None)
    config = TrackingConfig(mlflow=mlflow, servers=servers)
    _expect(problem, lambda: check_mlflow(config, {"MLFLOW_TRACKING_URI": secret} if secret else {}))


@pytest.mark.parametrize(
    ("url", "mode", "servers", "problem"),
    [
        ("", "online", (), ""),
        ("https://wandb.example", "online", (), ""),
        ("http://wandb.example", "online", (), "without encryption"),
        ("", "online", ("https://wandb.example",), "not among the operator's tenants.trackers"),
        ("", "online", ("https://api.wandb.ai",), ""),
        ("https://evil.example", "online", ("https://wandb.example",), "not among the operator's tenants.trackers"),
        ("http://wandb.example", "online", ("http://wandb.example",), ""),
        ("http://evil.example", "offline", ("https://wandb.example",), ""),
        ("http://evil.example", "online", None, ""),
    ],
)
def test_t11_weights_and_biases_is_one_of_the_allowed_servers(
    url: str, mode: Any, servers: tuple[str, ...] | None, problem: str
) -> None:
    config = TrackingConfig(wandb=WandbConfig(project="p", mode=mode), servers=servers)
    _expect(problem, lambda: check_wandb(config, {"WANDB_BASE_URL": url} if url else {}))


def _expect(problem: str, check: Any) -> None:
    if not problem:
        check()
        return
    with pytest.raises(RuntimeError, match=problem):
        check()


_NAMES = {
    "public.example": ["8.8.8.8", "2606:4700::1111"],
    "minio.storage": ["10.96.0.7"],
    "one-of-both.example": ["8.8.8.8", "169.254.169.254"],
    "unknown.example": [],
}


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://169.254.169.254", "https://169.254.170.2", "https://[fd00:ec2::254]", "https://[fe80::1]",
        "https://127.0.0.1:9000", "https://[::1]:9000", "https://[::ffff:169.254.169.254]", "https://0.0.0.0",
        "https://[::]", "https://10.0.0.1", "https://192.168.1.1", "https://172.16.0.1", "https://100.64.0.1",
        "https://[fc00::1]", "https://[64:ff9b::a9fe:a9fe]", "https://[2002:a9fe:a9fe::1]", "https://224.0.0.1",
        "https://[64:ff9b:1::a9fe:a9fe]", "https://[::169.254.169.254]", "https://[::ffff:0:169.254.169.254]",
        "https://[fec0::1]", "https://168.63.129.16", "https://192.0.0.192", "https://100.100.100.200",
        "https://minio.storage:9000", "https://one-of-both.example", "https://", "not a url", "https://[",
    ],
)  # fmt: skip
def test_t12_an_endpoint_inside_the_cluster_is_refused(endpoint: str) -> None:
    with pytest.raises(RunError, match=r"storage\.s3\.allowedEndpoints") as refusal:
        check(endpoint, "AWS_ENDPOINT_URL", "https://s3.example", (), "S3", _resolve)
    assert refusal.value.reason == "InvalidConfig"
    for allowed in (("*",), None):
        check(endpoint, "AWS_ENDPOINT_URL", None, allowed, "S3", _resolve)


def _resolve(host: str) -> list[str]:
    return _NAMES.get(host, [host])


def test_t12_numbers_in_other_notations_are_the_addresses_that_they_are() -> None:
    for host in ("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "127.1", "localhost"):
        with pytest.raises(RunError, match="no public address"):
            check(f"https://{host}", "AWS_ENDPOINT_URL", None, (), "S3", addresses)


@pytest.mark.parametrize(
    ("endpoint", "allowed", "accepted"),
    [
        ("https://public.example", (), True),
        ("https://unknown.example", (), True),
        ("https://s3.example", (), True),
        ("https://minio.storage:9000", ("https://minio.storage:9000",), True),
        ("https://minio.storage:9001", ("https://minio.storage:9000",), False),
        ("https://public.example", ("https://minio.storage:9000",), False),
        ("https://s3.example", ("https://minio.storage:9000",), True),
    ],
)
def test_t12_an_endpoint_is_the_administrators_a_listed_or_a_public_one(
    endpoint: str, allowed: tuple[str, ...], accepted: bool
) -> None:
    arguments = (endpoint, "AWS_ENDPOINT_URL", "https://s3.example", allowed, "S3", _resolve)
    if accepted:
        check(*arguments)
        return
    with pytest.raises(RunError, match="storage:9000"):
        check(*arguments)


_PLACES = (
    "https://me:CANARY@s3.example", "https://s3.example?key=CANARY", "https://s3.example/#CANARY", "https://[fe80::1%25eth0]",
    "https://s3.example\\@169.254.169.254", "https://s3.example:CANARY", "https://\u24d4xample.com", "ftp://s3.example",
    "https://me:CANARY@[", "file:///etc/passwd", "https://s3.example\n.evil", "https://%2561.example", "unix:/run/x",
)  # fmt: skip


@pytest.mark.parametrize("endpoint", _PLACES)
@pytest.mark.parametrize("allowed", [(), ("*",), None])
def test_t12_an_endpoint_is_a_plain_url_and_a_password_in_it_isnt_shown(
    endpoint: str, allowed: tuple[str, ...] | None
) -> None:
    config = S3Config(allow_http=True, allowed_endpoints=allowed)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": endpoint}
    with pytest.raises(RunError, match="AWS_ENDPOINT_URL isn't a URL such as") as refusal:
        s3.access_options(config, keys, {})
    assert refusal.value.reason == "InvalidConfig"
    assert "CANARY" not in refusal.value.message


@pytest.mark.parametrize("region", ["evil.example/x?", "evil.example#", "a.b", "us-east-1/", "@evil", "a b", "\u2024"])
def test_t12_a_region_is_no_part_of_another_servers_name(region: str) -> None:
    for keys in ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, {}):
        with pytest.raises(RunError, match="AWS_REGION isn't a region"):
            s3.access_options(S3Config(), {**keys, "AWS_REGION": region}, {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token"})
    assert s3.access_options(S3Config(), {"AWS_REGION": "eu-west-1"}, {})["region"] == "eu-west-1"


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/", "http://[fd00:ec2::254]", "http://2852039166:80", "http://[::ffff:169.254.169.254]/x",
     "http://168.63.129.16", "http://127.0.0.1:9", "http://localhost:9"],
)  # fmt: skip
def test_t11_a_tracker_isnt_the_node_or_the_pod(url: str) -> None:
    with pytest.raises(RuntimeError, match="on the node or in the pod"):
        check_mlflow(TrackingConfig(mlflow=MlflowConfig(uri=url), servers=()), {})
    with pytest.raises(RuntimeError, match="on the node or in the pod"):
        check_wandb(TrackingConfig(wandb=WandbConfig(project="p"), servers=()), {"WANDB_BASE_URL": url})
    check_mlflow(TrackingConfig(mlflow=MlflowConfig(uri=url), servers=(url,)), {})


def test_t11_a_password_in_the_url_of_a_secret_isnt_shown() -> None:
    for url in ("http://me:CANARY@wandb.example?k=CANARY", "https://me:CANARY@169.254.169.254"):
        for servers in ((), ("https://wandb.example",)):
            with pytest.raises(RuntimeError) as refusal:
                check_wandb(TrackingConfig(wandb=WandbConfig(project="p"), servers=servers), {"WANDB_BASE_URL": url})
            assert "CANARY" not in str(refusal.value)


_INSIDE = "http://169.254.169.254"
_OPENED = {
    "s3": lambda run: s3.access_options(
        run.s3, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": _INSIDE}, {}),
    "gcs": lambda run: gcs.access_options(
        run.gcs, {"GOOGLE_APPLICATION_CREDENTIALS": "{}", "GOOGLE_BASE_URL": _INSIDE}, {}),
    "azure": lambda run: azure.access_options(
        run.azure, {"AZURE_STORAGE_ACCOUNT": "a", "AZURE_STORAGE_KEY": "aw==", "AZURE_STORAGE_ENDPOINT": _INSIDE}, {}),
}  # fmt: skip


def test_t11_a_client_secret_goes_to_no_server_inside() -> None:
    keys = {"AZURE_STORAGE_ACCOUNT": "account", "AZURE_TENANT_ID": "t", "AZURE_CLIENT_ID": "c"}
    keys |= {"AZURE_CLIENT_SECRET": "s", "AZURE_AUTHORITY_HOST": "https://169.254.169.254"}
    with pytest.raises(RunError, match=r"AZURE_AUTHORITY_HOST .* no public address"):
        azure.access_options(plan(a_job(), parse("storage: {azure: {allowedEndpoints: []}}")).azure, keys, {})


@pytest.mark.parametrize("store", _OPENED)
def test_t12_the_pod_checks_the_endpoint_of_the_secret_by_the_charts_list(store: str) -> None:
    settings = parse(f"storage: {{{store}: {{allowHttp: true, allowedEndpoints: []}}}}")
    with pytest.raises(RunError, match="no public address") as refusal:
        _OPENED[store](plan(a_job(), settings))
    assert f"storage.{store}.allowedEndpoints" in refusal.value.message


def test_t11_the_pod_has_the_charts_list_of_trackers() -> None:
    assert plan(a_job(), parse("")).tracking.servers == ()
    assert plan(a_job(), parse("tenants: {trackers: [https://m]}")).tracking.servers == ("https://m",)
