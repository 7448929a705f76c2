"""Which names a local cluster's DNS has, from the objects that the API server returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localcluster.dns import HostsFile, hosts

_SERVICES, _SLICES = "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"


def _service(name: str, address: str | None, namespace: str = "team") -> dict[str, Any]:
    spec = {"clusterIP": address} if address else {"type": "ExternalName", "externalName": "elsewhere.example.com"}
    return {"metadata": {"uid": name, "name": name, "namespace": namespace}, "spec": spec}


def _slice(service: str, *endpoints: dict[str, Any]) -> dict[str, Any]:
    meta = {"uid": f"{service}-slice", "namespace": "team", "labels": {"kubernetes.io/service-name": service}}
    return {"metadata": meta, "endpoints": list(endpoints)}


def test_a_service_has_its_own_address_and_a_headless_one_those_of_its_ready_endpoints() -> None:
    services = [_service("web", "10.9.0.1"), _service("peers", "None"), _service("outside", None)]
    slices = [
        _slice("web", {"addresses": ["10.8.0.1"]}),
        _slice(
            "peers",
            {"addresses": ["10.8.0.2"], "hostname": "peers-0", "conditions": {"ready": True}},
            {"addresses": ["10.8.0.3"], "conditions": {}},
            {"addresses": ["10.8.0.4"], "hostname": "peers-2", "conditions": {"ready": False}},
        ),
        _slice("deleted", {"addresses": ["10.8.0.9"]}),
        {"metadata": {"uid": "x", "namespace": "team"}, "endpoints": None},
    ]
    assert hosts(services, slices).splitlines() == [
        "10.8.0.2 peers-0.peers.team.svc.cluster.local",
        "10.8.0.2 peers.team.svc.cluster.local",
        "10.8.0.3 peers.team.svc.cluster.local",
        "10.9.0.1 web.team.svc.cluster.local",
    ]


def test_an_endpoint_belongs_to_the_service_of_its_own_namespace() -> None:
    services = [_service("peers", "None", namespace="other")]
    assert hosts(services, [_slice("peers", {"addresses": ["10.8.0.2"]})]) == ""


def test_the_file_appears_when_both_resources_are_listed_and_follows_events(tmp_path: Path) -> None:
    path = tmp_path / "services"
    file = HostsFile(path)
    file.replace(_SERVICES, [_service("web", "10.9.0.1")])
    assert not path.exists()
    file.replace(_SLICES, [])
    assert path.read_text() == "10.9.0.1 web.team.svc.cluster.local\n"
    file.update(_SERVICES, {"type": "MODIFIED", "object": _service("web", "10.9.0.2")})
    assert path.read_text() == "10.9.0.2 web.team.svc.cluster.local\n"
    file.update(_SERVICES, {"type": "DELETED", "object": _service("web", "10.9.0.2")})
    assert path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]
