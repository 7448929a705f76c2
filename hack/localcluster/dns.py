"""Serves the names of Services to pods: it watches the API server and writes a hosts file.

dnsmasq reads the file again whenever it is replaced. There are A and PTR records of Services with
an address and of the ready endpoints of headless ones; there are neither SRV records nor
ExternalName Services. See https://github.com/kubernetes/dns/blob/master/docs/specification.md.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from localcluster.api import Api, ApiError
from localcluster.configs import DOMAIN

TTL_SECONDS = 2
_WATCH_SECONDS = 300
_RESOURCES = ("/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices")
_HEADLESS = "None"

Raw = Mapping[str, Any]


def hosts(services: Iterable[Raw], slices: Iterable[Raw]) -> str:
    """Returns the hosts file of these Services and EndpointSlices, sorted. Pure."""
    names = {}
    for service in services:
        meta, spec = service["metadata"], service["spec"]
        names[meta["namespace"], meta["name"]] = (_domain(meta["namespace"], meta["name"]), spec.get("clusterIP"))
    lines = {f"{address} {name}" for name, address in names.values() if address and address != _HEADLESS}
    for endpoint_slice in slices:
        meta = endpoint_slice["metadata"]
        service_name = meta.get("labels", {}).get("kubernetes.io/service-name", "")
        name, address = names.get((meta["namespace"], service_name), ("", ""))
        if address == _HEADLESS:
            lines.update(_endpoints(endpoint_slice, name))
    return "".join(f"{line}\n" for line in sorted(lines))


def _endpoints(endpoint_slice: Raw, name: str) -> Iterator[str]:
    for endpoint in endpoint_slice.get("endpoints") or ():
        if endpoint.get("conditions", {}).get("ready") is False:
            continue
        for address in endpoint["addresses"]:
            if hostname := endpoint.get("hostname"):
                yield f"{address} {hostname}.{name}"
            yield f"{address} {name}"


def _domain(namespace: str, name: str) -> str:
    return f"{name}.{namespace}.svc.{DOMAIN}"


class HostsFile:
    """The hosts file, which is complete once both resources have been listed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._objects: dict[str, dict[str, Raw]] = {}
        self._written = ""

    def replace(self, resource: str, objects: Iterable[Raw]) -> None:
        """Replaces all objects of a resource."""
        with self._lock:
            self._objects[resource] = {item["metadata"]["uid"]: item for item in objects}
            self._write()

    def update(self, resource: str, event: Raw) -> None:
        """Applies a watch event: ADDED, MODIFIED or DELETED."""
        with self._lock:
            uid = event["object"]["metadata"]["uid"]
            if event["type"] == "DELETED":
                self._objects[resource].pop(uid, None)
            else:
                self._objects[resource][uid] = event["object"]
            self._write()

    def _write(self) -> None:
        if len(self._objects) < len(_RESOURCES):
            return
        text = hosts(*(self._objects[resource].values() for resource in _RESOURCES))
        if text != self._written:
            draft = self._file.with_name(f".{self._file.name}")  # dnsmasq ignores hidden files
            draft.write_text(text)
            draft.rename(self._file)
            self._written = text


def follow(api: Api, resource: str, file: HostsFile) -> None:
    """Lists a resource, then watches it until the watch ends. Raises ApiError."""
    listed = api.get(resource)
    file.replace(resource, listed["items"])
    options = {
        "watch": "true",
        "resourceVersion": listed["metadata"]["resourceVersion"],
        "timeoutSeconds": _WATCH_SECONDS,
    }
    for line in api.lines(f"{resource}?{urlencode(options)}", _WATCH_SECONDS + 30):
        event = json.loads(line)
        if event["type"] == "ERROR":
            return
        file.update(resource, event)


def is_ready(folder: Path, address: str) -> bool:
    """Whether dnsmasq accepts connections and has records to serve."""
    if not (folder / "services").exists():
        return False
    try:
        with socket.create_connection((address, 53), timeout=1):
            return True
    except OSError:
        return False


def main(server: str, pki: str, folder: str) -> None:
    """Follows both resources forever; if the API server fails, it retries every second."""
    api, file = Api(server, Path(pki)), HostsFile(Path(folder) / "services")

    def forever(resource: str) -> None:
        while True:
            try:
                follow(api, resource, file)
            except ApiError as error:
                print(f"localcluster dns: {error}; retrying in 1 s", file=sys.stderr, flush=True)
                time.sleep(1)

    threads = [threading.Thread(target=forever, args=(resource,)) for resource in _RESOURCES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
