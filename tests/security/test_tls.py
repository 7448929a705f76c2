"""Training pods recognize the operator by a certificate of the release's own authority."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvloop
from aiohttp import web
from cryptography import x509

from chart.support.helm_rendering import NAMESPACE, Object, of_kind, pod_specs, render
from finetune_api import names
from finetune_api.messages.progress import Progress
from finetune_api.messages.run import ProgressConfig, parse
from finetune_operator.servers.connections import Limits, serve
from finetune_operator.servers.tls import Certificate, Lease
from finetune_trainer.reporting.progress import post
from k8s_operator.support.kubelet_stand_in import World
from k8s_operator.support.operator_process import Operator
from security.support.posts import pod_token

_SERVER_NAME = f"finetune-operator.{NAMESPACE}.svc"
_FILES = ("ca.crt", "tls.crt", "tls.key")


def _secret(objects: list[Object]) -> Object:
    (secret,) = of_kind(objects, "Secret")
    return secret


def _write(helm: str, folder: Path) -> str:
    """Makes a certificate and an authority as an install does, and returns the authority."""
    data = _secret(render(helm, "crds.install=false"))["data"]
    folder.mkdir(exist_ok=True)
    for name in _FILES:
        (folder / name).write_bytes(base64.b64decode(data[name]))
    return (folder / "ca.crt").read_text()


def test_the_operator_gets_its_certificate_without_reading_a_secret(helm: str) -> None:
    objects = render(helm)
    operator = pod_specs(of_kind(objects, "Deployment"))[0]
    (volume,) = [volume for volume in operator["volumes"] if "secret" in volume]
    assert volume["secret"]["secretName"] == _secret(objects)["metadata"]["name"]
    assert "items" not in volume["secret"]  # the kubelet mounts the key of the authority, too
    own = pod_specs(of_kind(render(helm, "progress.tls.secretName=mine"), "Deployment"))[0]
    (volume,) = [volume for volume in own["volumes"] if "secret" in volume]
    assert {item["key"] for item in volume["secret"]["items"]} == set(_FILES)
    for sets in (("progress.enabled=false",), ("progress.tls.enabled=false",)):
        objects = render(helm, *sets)
        assert not of_kind(objects, "Secret")
        assert not [v for v in pod_specs(of_kind(objects, "Deployment"))[0]["volumes"] if "secret" in v]


def test_cert_manager_makes_the_certificate_where_it_is_installed(helm: str) -> None:
    objects = render(helm, "progress.tls.certManager=true")
    assert not of_kind(objects, "Secret")
    certificates = {one["spec"]["secretName"]: one["spec"] for one in of_kind(objects, "Certificate")}
    (volume,) = [v for v in pod_specs(of_kind(objects, "Deployment"))[0]["volumes"] if "secret" in v]
    leaf = certificates.pop(volume["secret"]["secretName"])
    (authority,) = certificates.values()
    assert leaf["dnsNames"] == [_SERVER_NAME]
    assert authority["isCA"] is True
    issuers = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "Issuer")}
    assert issuers[leaf["issuerRef"]["name"]]["ca"]["secretName"] == authority["secretName"]
    own = render(helm, "progress.tls.secretName=mine")
    assert not of_kind(own, "Secret", "Certificate", "Issuer")
    (volume,) = [v for v in pod_specs(of_kind(own, "Deployment"))[0]["volumes"] if "secret" in v]
    assert volume["secret"]["secretName"] == "mine"


def _write_authority(helm: str, folder: Path) -> str:
    """Has an authority as an install makes it, and the one before it, if there is one."""
    data = _secret(render(helm, "crds.install=false"))["data"]
    folder.mkdir(exist_ok=True)
    for name in ("ca.crt", "ca.key"):
        if (folder / name).exists():
            (folder / name).rename(folder / f"former-{name}")
        (folder / name).write_bytes(base64.b64decode(data[name]))
    return (folder / "ca.crt").read_text()


def _presented(server: ssl.SSLContext, authority: str, name: str = _SERVER_NAME) -> x509.Certificate:
    """The certificate that a server presents to a pod, which verifies it. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cadata=authority).wrap_bio(to_client, to_server, server_hostname=name)
    ends = (client, server.wrap_bio(to_server, to_client, server_side=True))
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    presented = client.getpeercert(binary_form=True)
    assert presented is not None
    return x509.load_der_x509_certificate(presented)


def test_the_operator_renews_its_certificate_without_an_upgrade(helm: str, tmp_path: Path) -> None:
    authority, now = _write_authority(helm, tmp_path / "tls"), datetime.now(UTC)
    clock = [now - timedelta(days=30)]  # the client's clock is the machine's
    certificate = Certificate(tmp_path / "tls", Lease(_SERVER_NAME, timedelta(days=40)), lambda: clock[0])
    server = certificate.context()
    first = _presented(server, authority)
    assert _presented(server, authority).serial_number == first.serial_number
    clock[0] = now - timedelta(days=2)  # 28 of its 40 days are over
    second = _presented(server, authority)
    assert second.serial_number != first.serial_number
    assert second.not_valid_after_utc == (clock[0] + timedelta(days=40)).replace(microsecond=0)
    with pytest.raises(ssl.SSLError, match="evil"):
        _presented(server, authority, "evil.example")
    other = _write_authority(helm, tmp_path / "other")
    with pytest.raises(ssl.SSLError):
        _presented(server, other)


def test_each_replica_and_each_process_is_recognized_by_the_same_authority(helm: str, tmp_path: Path) -> None:
    authority = _write_authority(helm, tmp_path / "tls")
    lease = Lease(_SERVER_NAME, timedelta(days=30))
    servers = [Certificate(tmp_path / "tls", lease).context() for _ in range(2)]
    assert len({_presented(server, authority).serial_number for server in servers}) == 2


def test_a_new_authority_is_recognized_by_pods_that_know_the_former_one_only(helm: str, tmp_path: Path) -> None:
    former = _write_authority(helm, tmp_path / "tls")
    server = Certificate(tmp_path / "tls", Lease(_SERVER_NAME, timedelta(days=30))).context()
    before = _presented(server, former)
    new = _write_authority(helm, tmp_path / "tls")
    after = _presented(server, new)
    assert after.issuer == x509.load_pem_x509_certificate(new.encode()).subject
    assert after.serial_number != before.serial_number
    assert _presented(server, former) == after, "a pod that has started before"
    stranger = _write_authority(helm, tmp_path / "stranger")
    with pytest.raises(ssl.SSLError):
        _presented(server, stranger)
    (tmp_path / "tls" / "ca.key").write_text("garbage")
    assert _presented(server, new) == after, "the last good certificate stays"


@pytest.mark.cluster
def test_pods_recognize_an_operator_that_renews_and_restarts(
    world: World, operators: Callable[..., Operator], helm: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tls"
    former = _write_authority(helm, folder)
    operator = operators(progress={"certificate": str(folder), "serverName": _SERVER_NAME, "certificateSeconds": 3})
    operator.settings["progress"]["url"] = f"https://127.0.0.1:{operator.progress_port}"
    operator.start()
    world.submit("train")
    (pod,) = world.run_pods("train-1")
    config = parse(pod["metadata"]["annotations"][names.ANNOTATION_RUN_CONFIG]).progress
    assert config is not None
    assert config.authority == former
    (tmp_path / "token").write_text(pod_token(world, pod))
    config = config.model_copy(update={"token_path": str(tmp_path / "token")})
    assert _status(config) == 200
    time.sleep(4)
    assert _status(config) == 200, "the first certificate has ended"
    _write_authority(helm, folder)
    assert _status(config) == 200, "the pod knows the former authority only"
    operator.kill()
    operator.start(wait=False)
    operator.wait_ready(60)
    assert _status(config) == 200, "another process, as after a change of the leader"


@pytest.mark.cluster
def test_progress_travels_by_tls_and_a_new_certificate_is_used_at_once(
    world: World, operators: Callable[..., Operator], helm: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tls"
    old = _write(helm, folder)
    operator = operators(progress={"certificate": str(folder), "serverName": _SERVER_NAME})
    operator.settings["progress"]["url"] = f"https://127.0.0.1:{operator.progress_port}"
    operator.start()
    world.submit("train")
    (pod,) = world.run_pods("train-1")
    config = parse(pod["metadata"]["annotations"][names.ANNOTATION_RUN_CONFIG]).progress
    assert config is not None
    assert (config.authority, config.server_name) == (old, _SERVER_NAME)
    (tmp_path / "token").write_text(pod_token(world, pod))
    config = config.model_copy(update={"token_path": str(tmp_path / "token")})
    assert _status(config) == 200
    new = _write(helm, folder)
    assert _status(config) == 0, "the certificate is of an authority that the pod doesn't know"
    assert _status(config, authority=new) == 200
    assert _status(config, authority=new, server_name="evil.example") == 0
    assert _status(config, authority=new, url=config.url.replace("https://", "http://")) == 0
    assert _status(config, authority="", server_name="", url=config.url.replace("https://", "http://")) == 0
    (folder / "tls.key").write_text("garbage")
    assert _status(config, authority=new) == 200, "the last good certificate stays"


def _status(config: ProgressConfig, **changes: str) -> int:
    progress = Progress(attempt=1, phase="training", message="")
    return post(config.model_copy(update=changes), progress, timeout=20.0).status


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_p7_connections_count_before_their_handshake_and_it_has_a_limit(
    helm: str, tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    authority = _write(helm, tmp_path / "tls")
    limits = Limits(connections=6, per_address=3, handshake_seconds=1.0)
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(_half_open(tmp_path / "tls", authority, limits), 60))


async def _half_open(folder: Path, authority: str, limits: Limits) -> None:
    app = web.Application()

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="served")

    app.router.add_get("/", answer)
    port = _free_port()
    runner = await serve(app, port, "test", limits, Certificate(folder).context())
    assert runner is not None
    try:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        ended = [asyncio.create_task(reader.read()) for reader, _ in silent]
        done, _ = await asyncio.wait(ended, timeout=0.5)
        assert len(done) >= 20 - limits.per_address
        context = ssl.create_default_context(cadata=authority)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=_SERVER_NAME)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"served")
        await asyncio.gather(*ended, return_exceptions=True)  # the handshakes have ended, too
        for _, stream in silent:
            stream.close()
        plain, to_plain = await asyncio.open_connection("127.0.0.1", port)
        to_plain.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"served" not in await plain.read()
    finally:
        await runner.cleanup()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
