"""Training pods recognize the operator by a certificate of the release's own authority."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from aiohttp import web

from chart.support.helm_rendering import NAMESPACE, Object, of_kind, pod_specs, render
from finetune_api import names
from finetune_api.messages.progress import Progress
from finetune_api.messages.run import ProgressConfig, parse
from finetune_operator.servers.connections import Limits, serve
from finetune_operator.servers.tls import Certificate
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
    assert {item["key"] for item in volume["secret"]["items"]} == set(_FILES)  # the authority's key isn't there
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
